# Functions that the other scripts of this directory share; sourced, never run.
# Bash only. Nothing here knows a machine: interpreters and packages are looked for.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONUNBUFFERED=1

say() { printf '==> %s\n' "$*"; }
warn() { printf '==> NOTE: %s\n' "$*" >&2; }
die() { printf '==> FAILED: %s\n' "$*" >&2; exit 1; }

# Answers "X.Y X.Y.Z executable" for a CPython of 3.10 or later that can make virtual
# environments, nothing for any other program. Pre-releases and free-threaded builds are left out.
describe_python() {
    "$1" -I - 2>/dev/null <<'PY' || true
import importlib.util, platform, sys, sysconfig
v = sys.version_info
ok = (
    sys.implementation.name == "cpython"
    and v >= (3, 10)
    and v.releaselevel == "final"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
    and sys.prefix == sys.base_prefix
    and importlib.util.find_spec("venv")
    and importlib.util.find_spec("ensurepip")
)
if ok:
    print(f"{v.major}.{v.minor} {platform.python_version()} {sys.executable}")
PY
}

# One line "X.Y X.Y.Z executable" a minor version, newest first: what PATH names, then what
# pyenv has installed, if pyenv is there.
find_pythons() {
    local candidate directory seen=" "
    {
        for candidate in python3 python3.{10..20}; do
            type -aP "$candidate" 2>/dev/null || true
        done
        if command -v pyenv >/dev/null 2>&1 && directory=$(pyenv root 2>/dev/null); then
            for candidate in "$directory"/versions/*/bin/python3; do
                [ -x "$candidate" ] && printf '%s\n' "$candidate"
            done
        fi
    } | while read -r candidate; do
        # The same program under several names is asked once; pyenv's shims are programs of their own.
        directory=$(readlink -f "$candidate")
        case "$directory" in */shims/*) directory=$candidate ;; esac
        case "$seen" in *" $directory "*) continue ;; esac
        seen="$seen$directory "
        describe_python "$candidate"
    done | sort -t ' ' -k2,2Vr -k3,3 | awk '!seen[$1]++'
}

# The interpreter for .venv: $PYTHON if set, else the newest that was found.
main_python() {
    local line
    if [ -n "${PYTHON:-}" ]; then
        line=$(describe_python "$PYTHON")
        [ -n "$line" ] || die "PYTHON=$PYTHON is not a CPython >= 3.10 that has venv"
    else
        line=$(find_pythons | sed -n 1p)
    fi
    [ -n "$line" ] || die "no CPython >= 3.10 with venv was found (Debian: apt-get install python3-venv)"
    printf '%s\n' "$line"
}

# Whether a small program that needs Python.h, liburing.h and xxhash.h could be compiled for interpreter $1.
have_ring_tools() {
    local include
    include=$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["include"])') || return 1
    command -v "${CC:-cc}" >/dev/null 2>&1 || return 1
    printf '#include <Python.h>\n#include <liburing.h>\n#include <xxhash.h>\n' |
        "${CC:-cc}" -D_GNU_SOURCE -fsyntax-only -I"$include" ${CFLAGS:-} -x c - 2>/dev/null
}

# System packages for the compiled modules, only where that is allowed (root with apt-get) and something is
# missing. Never fails: without them the portable backend is what gets built and tested.
system_packages() {
    [ "$(uname -s)" = Linux ] || return 0
    have_ring_tools "$1" && return 0
    if [ "${CI_SYSTEM_PACKAGES:-1}" = 0 ]; then
        warn "C compiler or headers of Python, liburing or xxHash are missing and CI_SYSTEM_PACKAGES=0"
    elif [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        warn "C compiler or headers of Python, liburing or xxHash are missing, and this user may not install"
        warn "system packages (Debian: apt-get install gcc libc6-dev liburing-dev libxxhash-dev pkg-config python3-dev)"
    else
        say "installing gcc, liburing-dev, libxxhash-dev, pkg-config, python3-dev with apt-get"
        if ! { DEBIAN_FRONTEND=noninteractive apt-get -qq update &&
            DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
                gcc libc6-dev liburing-dev libxxhash-dev pkg-config python3-dev; } </dev/null >/dev/null; then
            warn "apt-get failed; going on without what it would have brought"
        fi
    fi
    return 0
}

# measuring_tools NAME...: programs (and Debian packages) that measuring uses where they are there.
measuring_tools() {
    local name missing=()
    for name in "$@"; do command -v "$name" >/dev/null 2>&1 || missing+=("$name"); done
    [ "${#missing[@]}" = 0 ] && return 0
    if [ "${CI_SYSTEM_PACKAGES:-1}" != 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing ${missing[*]} with apt-get"
        { DEBIAN_FRONTEND=noninteractive apt-get -qq update &&
            DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"; } \
            </dev/null >/dev/null && return 0
    fi
    warn "missing, so that what they measure is left out: ${missing[*]}"
}

# What an installed checkout depends on; while it stays the same, nothing is installed again.
install_stamp() {
    {
        "$1" -c 'import sys; print(sys.version, sys.prefix)'
        cat "$ROOT/pyproject.toml" "$ROOT/setup.py" "$ROOT"/csrc/*.[ch] "$ROOT"/csrc/building/*.py
        printf '%s\n' "$2" "${YATAGARASU_IO_URING:-}" "${YATAGARASU_COMPILED_CORE:-}" "${CFLAGS:-}"
        have_ring_tools "$1" && echo ring
    } | cksum
}

# make_venv DIRECTORY PYTHON EXTRAS: a virtual environment with the checkout installed in it,
# editable, so that what is tested is the checkout through its installed metadata.
make_venv() {
    local directory=$1 python=$2 extras=$3 stamp possible=auto ring core
    if ! [ -x "$directory/bin/python" ] || ! "$directory/bin/python" -c pass 2>/dev/null; then
        rm -rf "$directory"
        "$python" -m venv "$directory" || die "$python cannot make a virtual environment in $directory"
    fi
    stamp=$(install_stamp "$directory/bin/python" "$extras")
    # The editable install is one per checkout where the compiled module is concerned.
    if [ "$(cat "$directory/.ci-stamp" 2>/dev/null)" = "$stamp" ]; then
        say "$directory is up to date"
        return 0
    fi
    # Where the tools are there, a module that does not build is a failure, not a fallback.
    if [ "$(uname -s)" = Linux ] && have_ring_tools "$directory/bin/python"; then possible=require; fi
    ring=${YATAGARASU_IO_URING:-auto} core=${YATAGARASU_COMPILED_CORE:-auto}
    ring=${ring/#auto/$possible} core=${core/#auto/$possible}
    say "installing the checkout with [$extras] into $directory (io_uring: $ring, compiled core: $core)"
    (
        cd "$ROOT"
        "$directory/bin/python" -m pip install -q -U 'pip>=23.1' setuptools wheel </dev/null &&
            YATAGARASU_IO_URING=$ring YATAGARASU_COMPILED_CORE=$core YATAGARASU_WERROR=${YATAGARASU_WERROR:-1} \
                "$directory/bin/python" -m pip install -q -e ".[$extras]" </dev/null
    ) || die "pip install failed in $directory"
    printf '%s\n' "$stamp" >"$directory/.ci-stamp"
}

# What became of the compiled modules in the environment whose python is $1, a line each.
ring_state() {
    "$1" - <<'PY' || true
try:
    from yatagarasu_cache import _build_info as info
except ImportError:
    info = None
for name, module in (("RING", "io_uring module"), ("CORE", "core module")):
    built = getattr(info, f"{name}_BUILT", False)
    reason = getattr(info, f"{name}_REASON", "not installed by this build")
    print(f"==> {module}:", "built" if built else "NOT built", "--", reason)
PY
}

processors() { getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1; }

# How many tests run at once: on all processors, and one more, as many wait.
test_workers() { echo $(($(processors) + 1)); }
