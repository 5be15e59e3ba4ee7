#!/bin/sh
# Say which tool the build lacks, and the Debian package that has it; nothing if all are there.
# Usage: tools/preflight.sh PYTHON
python=$1
missing=

lack() {
	missing=1
	echo "make: $1 is missing; Debian has it in the package $2: apt-get install $2" >&2
}

if ! command -v "$python" >/dev/null 2>&1; then
	lack "$python" python3
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	echo "make: $("$python" --version) is too old; Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2
	missing=1
else
	"$python" -c 'import ensurepip, venv' 2>/dev/null || lack "the module venv of $python" python3-venv
	include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
	[ -f "$include/Python.h" ] || lack "Python.h (in $include)" python3-dev
fi
command -v "${CC:-gcc}" >/dev/null 2>&1 || lack "${CC:-gcc}" gcc
if command -v "${CC:-gcc}" >/dev/null 2>&1; then
	echo '#include <stdlib.h>' | "${CC:-gcc}" -fsyntax-only -xc - 2>/dev/null || lack "stdlib.h" libc6-dev
fi
case $(uname -m) in
x86_64) ;;
*)
	echo "make: this machine is $(uname -m); pyhyve's processors need an x86-64 host" >&2
	missing=1
	;;
esac
[ -z "$missing" ]
