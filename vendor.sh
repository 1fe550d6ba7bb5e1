#!/bin/sh
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the run_utils authors
set -eu && export LC_ALL=C

usage() {
    cat <<'USAGE'
Copy run_utils into a project, or bring an earlier copy up to date.

usage: vendor.sh [--check | --force] PACKAGE_DIR

Writes PACKAGE_DIR/run_utils/__init__.py, __main__.py and LICENSE, and touches
nothing else. A file that was edited, is newer or did not come from here stays.
  --check   write nothing; status 0: current, 1: not, 2: wrong usage
  --force   replace such files too; what was there is kept outside of the project,
            in ${XDG_STATE_HOME:-~/.local/state}/run_utils/
  --help    show this text
USAGE
}

# In a copy these lines stand below the licence: its project's tools pass it over.
notices() {
    cat <<'NOTICES'
# A copy, which vendor.sh brings up to date. Formatters and linters leave it alone:
# fmt: off
# isort: skip_file
# ruff: noqa: PGH004, RUF105
# ruff: noqa
# flake8: noqa
# pylint: skip-file
# mypy: ignore-errors
# autoflake: skip_file
NOTICES
}

# What a copy was made from: in a copy None is version and git blob id, "1.3.0 8c7e5a6...".
STAMP='^__vendored__[^=]*= '
STAMPED="$STAMP\"\\([0-9][^ \"]* [0-9a-f]\\{40\\}\\)\".*"

main() {
    mode=update
    case ${1-} in
        --check | --force) mode=${1#--} && shift ;;
        --help | -h) usage && exit 0 ;;
        --) ;;
        -*) misused "unknown option '$1'" ;;
    esac
    [ "${1-}" != -- ] || shift
    [ $# -gt 0 ] || misused "PACKAGE_DIR is missing"
    [ $# -eq 1 ] || misused "one PACKAGE_DIR is wanted, not $#"
    [ -d "$1" ] || misused "no such directory: '$1'; give the folder of your package, \
or make a new one with mkdir -p"
    ! grep -qs -- "$STAMP" "$1/__init__.py" || misused "'$1' is a copy; give the folder it is in"

    locate_source && locate_copy "$1"
    before=$(describe_copy) && problem=$(find_problem)
    [ "$mode" != check ] || check
    [ "$mode" = force ] || [ -z "$problem" ] ||
        die "$problem; --force goes on, with a backup"
    for name in LICENSE __main__.py __init__.py; do # the stamp, which vouches for all, last
        write_changed "$name"
    done
    format_step
}

check() {
    [ -z "$problem" ] || die "$problem"
    for name in LICENSE __main__.py; do
        [ "$before" = none ] || [ -e "$copy/$name" ] || die "$copy/$name is missing"
    done
    format_step
    [ "$before" = "$version $id" ] || exit 1
    exit 0
}

# Paths never pass through $(...), which would eat a newline at their end.
locate_source() {
    case $0 in /* | ./*) script=$0 ;; *) script=./$0 ;; esac
    while [ -L "$script" ]; do
        link=$(readlink "$script")
        case $link in /*) script=$link ;; *) script=${script%/*}/$link ;; esac
    done
    here=${script%/*} source=${script%/*}/run_utils.py
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
    case $1 in /*) package=$1 ;; *) package=./$1 ;; esac && copy=$package/run_utils
    [ ! -e "$copy" ] || [ -d "$copy" ] || die "$copy is in the way: not a directory"
    for name in LICENSE __main__.py __init__.py; do
        [ ! -d "$copy/$name" ] || die "$copy/$name is in the way: it is a directory"
    done
}

# Print "VERSION BLOB" of a stamped copy, "none" without a copy, else "unknown".
describe_copy() {
    [ -e "$copy/__init__.py" ] || { echo none && return; }
    stamp=$(sed -n "s/$STAMPED/\1/p" "$copy/__init__.py")
    echo "${stamp:-unknown}"
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
    elif [ -e "$copy/__main__.py" ] && ! is_current __main__.py &&
        ! program | cmp -s - "$copy/__main__.py"; then # which version 1 wrote
        echo "$copy/__main__.py was not written by vendor.sh"
    elif [ -e "$copy/LICENSE" ] && ! is_current LICENSE; then
        echo "$copy/LICENSE was not written by vendor.sh"
    fi
}

# Without notices and stamp, an untouched copy is its source again, byte for byte.
is_edited() { [ "$(blob_id stamped "$copy/__init__.py" None :)" != "${before#* }" ]; }
is_current() { content_of "$1" | cmp -s - "$copy/$1"; }
is_newer() {
    awk -v a="$1" -v b="$2" 'BEGIN { split(a, x, "."); split(b, y, ".")
        for (i = 1; i <= 3; i++) if (x[i] + 0 != y[i] + 0) exit (x[i] + 0 < y[i] + 0)
        exit 1 }'
}

format_step() {
    case $before in
        "$version $id") say "$version is current" ;;
        "$version "*) say "$(short "$before") -> $(short "$version $id")" ;; # unreleased
        *) say "${before%% *} -> $version" ;;
    esac
}
short() { printf '%s %.7s' "${1%% *}" "${1#* }"; }

# Print what a file of the copy is to hold.
content_of() {
    case $1 in
        __init__.py) stamped "$source" "\"$version $id\"" notices ;;
        __main__.py) head -n 2 <"$source" && notices && program ;;
        *) cat "$here/$1" ;;
    esac
}
program() { printf 'from . import main\n\nraise SystemExit(main())\n'; }

# Print FILE with VALUE in its stamp, and what NOTICES prints in the place of the comments
# below its first two lines. By head and tail, not sed: all other bytes stay.
stamped() {
    code=$(awk 'NR > 2 && !/^#/ { print NR; exit }' "$1")
    line=$(grep -n "$STAMP" "$1" | head -n 1)
    number=${line%%:*} text=${line#*:} rest=${line#*= }
    case $rest in \"*) rest=${rest#\"} && rest=${rest#*\"} ;; *) rest=${rest#None} ;; esac
    head -n 2 <"$1" && "$3" && head -n $((number - 1)) <"$1" | tail -n +"$code" &&
        printf '%s= %s%s\n' "${text%%= *}" "$2" "$rest" && tail -n +$((number + 1)) <"$1"
}

write_changed() {
    ! is_current "$1" || return 0
    target=$copy/$1 temporary=$copy/.$1.$$
    [ -d "$copy" ] || mkdir "$copy" 2>/dev/null || die "cannot create $copy"
    [ "$mode" = update ] || [ ! -e "$target" ] || back_up "$target"
    trap 'rm -f "$temporary"' EXIT && trap 'exit 1' HUP INT TERM
    { content_of "$1" >"$temporary"; } 2>/dev/null || die "cannot write $copy"
    mv -f "$temporary" "$target" 2>/dev/null || die "cannot replace $target"
}

# Keep a file where neither git nor packaging finds it.
back_up() {
    folder=${XDG_STATE_HOME:-${HOME-}/.local/state}/run_utils number=1
    mkdir -p "$folder" 2>/dev/null || die "cannot create $folder, for a backup"
    while [ -e "$folder/${1##*/}.$number" ]; do number=$((number + 1)); done
    backup=$folder/${1##*/}.$number
    # noclobber: of two that write the same backup at once, one fails here
    (set -C && cat "$1" >"$backup") 2>/dev/null || die "cannot back up $1"
    say "kept ${1##*/} as $backup"
}

# Hash what a command prints as `git hash-object` does, which may not be there.
blob_id() {
    size=$("$@" | wc -c)
    sum=$({ printf 'blob %d\000' "$size" && "$@"; } | sha1)
    printf '%s' "${sum%% *}"
}
sha1() { if command -v sha1sum >/dev/null; then sha1sum; else shasum 2>/dev/null || :; fi; }

say() { printf '%s\n' "$1"; }
misused() { die "$1; see vendor.sh --help" 2; }
die() { printf 'vendor.sh: %s\n' "$1" >&2 && exit "${2-1}"; }

main "$@"
