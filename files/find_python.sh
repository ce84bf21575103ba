#!/bin/sh
# Prints the first Python, of those named or of the usual names, that can make the environment;
# or says in one sentence what to install.
set -u
[ $# -gt 0 ] || set -- python3 python3.13 python3.12 python3.11 python3.10

unfit="" without_venv=""
for python in "$@"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) unfit="$unfit${unfit:+, }$python is $version"; continue ;;
    esac
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        command -v "$python"
        exit 0
    fi
    without_venv="${without_venv:-$python $version}"
done

if [ -n "$without_venv" ]; then
    version=${without_venv##* }
    echo "${without_venv% *} (Python $version) has no venv module: install it, on Debian or Ubuntu with" \
        "'apt-get install python$version-venv', and run make again." >&2
else
    echo "Python 3.10 to 3.13 is needed and was not found${unfit:+ ($unfit)}: install one, on Debian or" \
        "Ubuntu with 'apt-get install python3 python3-venv', or name one with 'make PYTHON=/path/to/python3'." >&2
fi
exit 1
