"""ResNets on CIFAR-10 with TensorFlow: what stands behind the programs in the folder above."""
