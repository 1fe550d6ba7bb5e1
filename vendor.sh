#!/bin/sh
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the run_utils authors
set -eu
LC_ALL=C
export LC_ALL

usage() {
    cat <<'USAGE'
Copy run_utils into a project, or bring an earlier copy up to date.

usage: vendor.sh [--check | --force] PACKAGE_DIR

Writes PACKAGE_DIR/run_utils/__init__.py, __main__.py and LICENSE, and touches
nothing else. A file that was edited, is newer or did not come from here stays.

  --check   write nothing; status 0: current, 1: not, 2: wrong usage
  --force   replace such files too, and keep each as FILE.bak-1, .bak-2, ...
  --help    show this text
USAGE
}

# The line of run_utils.py that says what a copy was made from. In a copy None is
# "1.3.0 8c7e5a667f1b771847fe88c01c3de34413a1b220": version and git blob id.
STAMP='^__vendored__[^=]*= '
STAMPED="$STAMP\"\\([0-9][^ \"]* [0-9a-f]\\{40\\}\\)\".*"

main() {
    mode=update
    case ${1-} in
        --check) mode=check && shift ;;
        --force) mode=force && shift ;;
        --help | -h) usage && exit 0 ;;
        --) ;;
        -*) misused "unknown option '$1'" ;;
    esac
    [ "${1-}" != -- ] || shift
    [ $# -gt 0 ] || misused "PACKAGE_DIR is missing"
    [ $# -eq 1 ] || misused "one PACKAGE_DIR is wanted, not $#"
    [ -d "$1" ] || misused "no such directory: '$1'"

    locate_source
    locate_copy "$1"
    before=$(describe_copy)
    problem=$(find_problem)
    case $mode in
        check) check ;;
        update) [ -z "$problem" ] || die "$problem; --force goes on, with a backup" ;;
    esac
    write_changed LICENSE
    write_changed __main__.py
    write_changed __init__.py # last: the stamp vouches for all three
    say "$(format_step)"
}

check() {
    [ -z "$problem" ] || die "$problem"
    for name in LICENSE __main__.py; do
        [ "$before" = none ] || [ -e "$copy/$name" ] || die "$copy/$name is missing"
    done
    say "$(format_step)"
    [ "$before" = "$version $id" ] || exit 1
    exit 0
}

# === Source and copy ===
# Paths never pass through $(...), which would eat a newline at their end.

locate_source() {
    script=$0
    case $script in /* | ./*) ;; *) script=./$script ;; esac
    while [ -L "$script" ]; do
        link=$(readlink "$script")
        case $link in /*) script=$link ;; *) script=${script%/*}/$link ;; esac
    done
    here=${script%/*}
    source=$here/run_utils.py
    [ -f "$source" ] || die "run_utils.py is not beside vendor.sh"
    [ -f "$here/LICENSE" ] || die "LICENSE is not beside vendor.sh"
    [ "$(grep -c "$STAMP" "$source")" = 1 ] ||
        die "run_utils.py must have exactly one line that starts with '__vendored__ ='"
    version=$(sed -n 's/^__version__[^=]*= "\([^"]*\)".*/\1/p' "$source")
    [ -n "$version" ] || die "run_utils.py has no line __version__ = \"...\""
    id=$(blob_id cat "$source")
    [ ${#id} -eq 40 ] || die "sha1sum or shasum is needed, and neither is on PATH"
}

locate_copy() {
    case $1 in /*) package=$1 ;; *) package=./$1 ;; esac
    copy=$package/run_utils
    [ ! -e "$copy" ] || [ -d "$copy" ] || die "$copy is in the way: not a directory"
    for name in LICENSE __main__.py __init__.py; do
        [ ! -d "$copy/$name" ] || die "$copy/$name is in the way: it is a directory"
    done
}

# Print "VERSION BLOB" of a stamped copy, "none" without a copy, else "unknown".
describe_copy() {
    if [ ! -e "$copy/__init__.py" ]; then
        echo none
    else
        stamp=$(sed -n "s/$STAMPED/\1/p" "$copy/__init__.py")
        echo "${stamp:-unknown}"
    fi
}

# Say in one sentence what writing would destroy, or print nothing.
find_problem() {
    if [ "$before" = none ] && [ -e "$package/run_utils.py" ]; then
        echo "$package/run_utils.py would be hidden by a package of its name"
    elif [ "$before" = unknown ]; then
        echo "$copy/__init__.py was not written by vendor.sh"
    elif [ "$before" != none ] && is_edited; then
        echo "$copy/__init__.py was edited after ${before%% *} was copied"
    elif [ "$before" != none ] && is_newer "${before%% *}" "$version"; then
        echo "$copy/__init__.py is ${before%% *}, newer than $version"
    elif [ -e "$copy/__main__.py" ] && ! is_current __main__.py; then
        echo "$copy/__main__.py was not written by vendor.sh"
    elif [ -e "$copy/LICENSE" ] && ! is_current LICENSE; then
        echo "$copy/LICENSE was not written by vendor.sh"
    fi
}

# With None back in its stamp, an untouched copy is its source again, byte for byte.
is_edited() {
    [ "$(blob_id stamped "$copy/__init__.py" None)" != "${before#* }" ]
}

format_step() {
    if [ "$before" = "$version $id" ]; then
        echo "$version is current"
    elif [ "${before%% *}" = "$version" ]; then # a commit between two releases
        echo "$version $(short "${before#* }") -> $version $(short "$id")"
    else
        echo "${before%% *} -> $version"
    fi
}

# === Files ===

# Print what a file of the copy is to hold.
content_of() {
    case $1 in
        __init__.py) stamped "$source" "\"$version $id\"" ;;
        LICENSE) cat "$here/LICENSE" ;;
        __main__.py)
            cat <<'PYTHON'
from . import main

raise SystemExit(main())
PYTHON
            ;;
    esac
}

# Print FILE with VALUE in its stamp. By head and tail, not sed: all other bytes stay,
# a missing newline at the end too.
stamped() {
    line=$(grep -n "$STAMP" "$1" | head -n 1)
    number=${line%%:*}
    text=${line#*:}
    rest=${text#*= }
    case $rest in
        \"*) rest=${rest#\"} && rest=${rest#*\"} ;;
        *) rest=${rest#None} ;;
    esac
    head -n $((number - 1)) <"$1" &&
        printf '%s= %s%s\n' "${text%%= *}" "$2" "$rest" &&
        tail -n +$((number + 1)) <"$1"
}

is_current() {
    content_of "$1" | cmp -s - "$copy/$1"
}

write_changed() {
    ! is_current "$1" || return 0
    target=$copy/$1
    [ -d "$copy" ] || mkdir "$copy" 2>/dev/null || die "cannot create $copy"
    [ "$mode" = update ] || [ ! -e "$target" ] || back_up "$target"
    temporary=$copy/.$1.$$
    trap 'rm -f "$temporary"' EXIT
    trap 'exit 1' HUP INT TERM
    { content_of "$1" >"$temporary"; } 2>/dev/null || die "cannot write $copy"
    mv -f "$temporary" "$target" 2>/dev/null || die "cannot replace $target"
}

back_up() {
    number=1
    while [ -e "$1.bak-$number" ] || [ -L "$1.bak-$number" ]; do
        number=$((number + 1))
    done
    # noclobber: of two that write the same backup at once, one fails here
    (set -C && cat "$1" >"$1.bak-$number") 2>/dev/null || die "cannot back up $1"
    say "kept ${1##*/} as ${1##*/}.bak-$number"
}

# === Words and numbers ===

# Hash what a command prints as `git hash-object` does, which may not be there.
blob_id() {
    size=$("$@" | wc -c)
    sum=$({ printf 'blob %d\000' "$size" && "$@"; } | sha1)
    printf '%s' "${sum%% *}"
}

sha1() {
    if command -v sha1sum >/dev/null; then sha1sum; else shasum 2>/dev/null || :; fi
}

short() { printf '%.7s' "$1"; }

is_newer() {
    awk -v a="$1" -v b="$2" 'BEGIN {
        split(a, x, "."); split(b, y, ".")
        for (i = 1; i <= 3; i++) if (x[i] + 0 != y[i] + 0) exit (x[i] + 0 < y[i] + 0)
        exit 1
    }'
}

say() { printf '%s\n' "$1"; }

die() {
    printf 'vendor.sh: %s\n' "$1" >&2
    exit 1
}

misused() {
    printf 'vendor.sh: %s; see vendor.sh --help\n' "$1" >&2
    exit 2
}

main "$@"
