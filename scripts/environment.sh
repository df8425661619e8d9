# Sourced by the scripts beside it, not run. It sets
#     root                                   the project's folder
#     prepare_environment NAME CONSTRAINTS   builds the environment root/NAME, once, and sets `python` to its interpreter
# so that each script does its own set-up on a machine that has only Python, and the next one finds it done.
# What was installed is remembered in a stamp inside the environment: a changed dependency list installs again, and a
# set-up that was interrupted leaves no stamp and is completed by the next script. An environment that somebody made
# by hand is completed too. It works under the bash 3.2 of macOS.

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

fail() {
    printf '\nerror: %s\n' "$1" >&2
    exit 1
}

prepare_environment() {
    venv="$root/$1"
    python="$venv/bin/python"
    local constraints="$root/$2" wanted
    # The path belongs to it: console scripts carry the path of the environment they were written for.
    wanted="$(cat "$root/pyproject.toml" "$constraints" | cksum) $venv"

    is_ready "$wanted" && return
    # Two scripts started at once: the second waits here and then finds the work done.
    if command -v flock >/dev/null; then
        exec 9>"$venv.lock"
        flock -n 9 || { echo "Another script is setting up $venv; waiting for it." && flock 9; }
    fi
    if ! is_ready "$wanted"; then
        echo "== Setting up $venv (once; takes a few minutes) =="
        make_environment
        install_project "$constraints"
        printf '%s\n' "$wanted" >"$venv/installed"
    fi
    # Or the lock would be held for as long as the command that follows runs.
    exec 9>&-
}

is_ready() {
    [ -x "$python" ] && [ -f "$venv/installed" ] && [ "$(cat "$venv/installed")" = "$1" ]
}

# The first Python on the path that is new enough; prints its command.
find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_environment() {
    local base was_here
    base="$(find_python)" || fail "no Python 3.10 or newer on the path (python3 is $(python3 --version 2>/dev/null || echo missing)).
Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python), then run this again."

    # A moved or copied project folder: the console scripts point to the old place.
    was_here=yes
    if [ -f "$venv/installed" ]; then
        case "$(cat "$venv/installed")" in *" $venv") ;; *) was_here=no ;; esac
    fi
    if [ "$was_here" = no ] || ! has_pip; then
        "$base" -c 'import ensurepip, venv' 2>/dev/null || fail "$(command -v "$base") cannot make virtual environments: \
its venv or ensurepip module is missing.
Install it (Debian, Ubuntu: apt install python3-venv), or put another Python first on the path, then run this again."
        "$base" -m venv --clear "$venv"
    fi
    [ -n "$(usable_torch)" ] || borrow_torch "$base"
}

# An interpreter that is new enough and has pip, given a chance to get one: a set-up interrupted early leaves none.
has_pip() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || return 1
    "$python" -m pip --version >/dev/null 2>&1 && return
    "$python" -m ensurepip >/dev/null 2>&1 && "$python" -m pip --version >/dev/null 2>&1
}

# Prints the version of the torch that the environment sees, if it is in the range of pyproject.toml.
usable_torch() {
    "$python" - "$root/pyproject.toml" <<'EOF'
import re
import sys
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.specifiers import SpecifierSet


declared = re.search(r'"torch *([<>=!~][^"]*)"', Path(sys.argv[1]).read_text(encoding="utf-8")).group(1)
try:
    version = metadata.version("torch")
except metadata.PackageNotFoundError:
    sys.exit()
# Nightlies and vendors' builds count as pre-releases.
if SpecifierSet(declared).contains(version, prereleases=True):
    print(version)
EOF
}

# Lets the environment see the packages of the Python it is made with, if a usable torch is among them: a GPU image,
# conda or an active virtual environment has the build that fits the machine, gigabytes that need not come again.
# `venv --system-site-packages` would pass over the packages of a Python that is itself a virtual environment. Folders
# named in a .pth file come last on sys.path, so whatever is installed here takes precedence.
borrow_torch() {
    local borrowed
    borrowed="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
    "$1" - "$("$python" -c 'import sys; print(sys.version_info[:2])')" >"$borrowed" <<'EOF'
import importlib.util
import os
import sys


if str(sys.version_info[:2]) == sys.argv[1] and importlib.util.find_spec("torch"):
    print(*(p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")), sep="\n")
EOF
    [ -n "$(usable_torch)" ] || rm "$borrowed"
}

# pip's own configuration (indexes, find-links, proxies) is left as the machine has it.
install_project() {
    local pins="$venv/constraints.txt" log="$venv/install.log" torch
    # Python 3.10 came with pip 21.2; 22 is the first to install every pyproject.toml editable.
    "$python" -m pip install --quiet --disable-pip-version-check 'pip>=22'
    torch="$(usable_torch)"
    if [ -n "$torch" ]; then
        echo "torch $torch is already there: kept."
        sed "s/^torch==.*/torch==$torch/" "$1" >"$pins"
    else
        # By itself: it is most of the download, and pip shows a progress bar only when it writes to the terminal.
        cp "$1" "$pins"
        "$python" -m pip install --disable-pip-version-check --constraint "$pins" torch
    fi
    # A hundred small packages: a line for each, everything in the log.
    if ! "$python" -m pip install --disable-pip-version-check --constraint "$pins" \
        --editable "$root[report,test,quality]" 2>&1 | tee "$log" |
        sed -n -E 's/^(Collecting [^ ]+|Installing collected packages).*/\1/p; /^ERROR/p'; then
        tail -n 30 "$log" >&2
        fail "pip could not install the project; all it said is in $log.
Run this again to go on from here; if it fails in the same way, delete $venv first."
    fi
}
