# bash completion for imgprealloc(1).                                   -*- shell-script -*-
# SPDX-License-Identifier: Apache-2.0
#
# Written by tools/completion.py from what the command says of its options.

_imgprealloc() {
    local cur=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} verb= word
    local options= words= files= is_value=
    COMPREPLY=()
    # --option=value is three words to bash.
    if [[ $cur == "=" ]]; then
        cur=
    elif [[ $previous == "=" ]]; then
        previous=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    for word in "${COMP_WORDS[@]:1:COMP_CWORD - 1}"; do
        case $word in
            allocate | check | check-nova | complete | create | help | metrics | resize | show | thin) verb=${verb:-$word} ;;
            # After that there are no more options.
            --) previous=-- ;;
        esac
    done
    case $verb in
        "")
            options="--debug --help --log-file --quiet --verbose --version -h -q -v"
            words="allocate check check-nova complete create help metrics resize show thin"
            case $previous in
                --log-file) is_value=yes words= files=yes ;;
            esac
            ;;
        allocate)
            options="--column --disk-format --dry-run --fit-width --format --help --keep-free --long \
            --max-width --mode --noindent --on-unsupported --overlay-cluster-size \
            --overlay-subclusters --print-empty --quote --rate --rewrite --sort-ascending \
            --sort-column --sort-descending -c -f -h"
            files=yes
            case $previous in
                -f | --format) is_value=yes words="csv json table value yaml" files= ;;
                -c | --column) is_value=yes words="" files= ;;
                --quote) is_value=yes words="all minimal none nonnumeric" files= ;;
                --max-width) is_value=yes words="" files= ;;
                --sort-column) is_value=yes words="" files= ;;
                --disk-format) is_value=yes words="qcow2 raw" files= ;;
                --rate) is_value=yes words="" files= ;;
                --mode) is_value=yes words="falloc full metadata" files= ;;
                --on-unsupported) is_value=yes words="metadata full error" files= ;;
                --overlay-subclusters) is_value=yes words="unallocated allocated copied" files= ;;
                --overlay-cluster-size) is_value=yes words="16K 32K 64K 128K 256K 512K 1M 2M" files= ;;
                --keep-free) is_value=yes words="" files= ;;
            esac
            ;;
        check)
            options="--disk-format --help --level -h"
            files=yes
            case $previous in
                --disk-format) is_value=yes words="qcow2 raw" files= ;;
                --level) is_value=yes words="held preallocated" files= ;;
            esac
            ;;
        check-nova)
            options="--column --config-file --fit-width --format --help --long --max-width --noindent \
            --print-empty --quote --sort-ascending --sort-column --sort-descending -c -f -h"
            case $previous in
                -f | --format) is_value=yes words="csv json table value yaml" files= ;;
                -c | --column) is_value=yes words="" files= ;;
                --quote) is_value=yes words="all minimal none nonnumeric" files= ;;
                --max-width) is_value=yes words="" files= ;;
                --sort-column) is_value=yes words="" files= ;;
                --config-file) is_value=yes words= files=yes ;;
            esac
            ;;
        complete)
            options="--help --name --shell -h"
            case $previous in
                --name) is_value=yes words="" files= ;;
                --shell) is_value=yes words="bash none" files= ;;
            esac
            ;;
        create)
            options="--backing --backing-format --column --disk-format --fit-width --format --help \
            --keep-free --long --max-width --mode --noindent --on-unsupported \
            --overlay-cluster-size --overlay-subclusters --print-empty --quote --rate \
            --sort-ascending --sort-column --sort-descending -c -f -h"
            files=yes
            case $previous in
                -f | --format) is_value=yes words="csv json table value yaml" files= ;;
                -c | --column) is_value=yes words="" files= ;;
                --quote) is_value=yes words="all minimal none nonnumeric" files= ;;
                --max-width) is_value=yes words="" files= ;;
                --sort-column) is_value=yes words="" files= ;;
                --disk-format) is_value=yes words="qcow2 raw" files= ;;
                --rate) is_value=yes words="" files= ;;
                --mode) is_value=yes words="falloc full metadata" files= ;;
                --on-unsupported) is_value=yes words="metadata full error" files= ;;
                --overlay-subclusters) is_value=yes words="unallocated allocated copied" files= ;;
                --overlay-cluster-size) is_value=yes words="16K 32K 64K 128K 256K 512K 1M 2M" files= ;;
                --keep-free) is_value=yes words="" files= ;;
                --backing) is_value=yes words= files=yes ;;
                --backing-format) is_value=yes words="" files= ;;
            esac
            ;;
        help)
            options="--help -h"
            words="allocate check check-nova complete create help metrics resize show thin"
            ;;
        metrics)
            options="--disk-format --help --output -h -o"
            files=yes
            case $previous in
                --disk-format) is_value=yes words="qcow2 raw" files= ;;
                -o | --output) is_value=yes words= files=yes ;;
            esac
            ;;
        resize)
            options="--column --disk-format --fit-width --format --help --keep-free --long --max-width \
            --mode --noindent --on-unsupported --overlay-cluster-size --overlay-subclusters \
            --print-empty --quote --rate --sort-ascending --sort-column --sort-descending -c -f \
            -h"
            files=yes
            case $previous in
                -f | --format) is_value=yes words="csv json table value yaml" files= ;;
                -c | --column) is_value=yes words="" files= ;;
                --quote) is_value=yes words="all minimal none nonnumeric" files= ;;
                --max-width) is_value=yes words="" files= ;;
                --sort-column) is_value=yes words="" files= ;;
                --disk-format) is_value=yes words="qcow2 raw" files= ;;
                --rate) is_value=yes words="" files= ;;
                --mode) is_value=yes words="falloc full metadata" files= ;;
                --on-unsupported) is_value=yes words="metadata full error" files= ;;
                --overlay-subclusters) is_value=yes words="unallocated allocated copied" files= ;;
                --overlay-cluster-size) is_value=yes words="16K 32K 64K 128K 256K 512K 1M 2M" files= ;;
                --keep-free) is_value=yes words="" files= ;;
            esac
            ;;
        show)
            options="--check --column --disk-format --fit-width --format --help --layout --long \
            --max-width --noindent --output --print-empty --quote --sort-ascending --sort-column \
            --sort-descending --state -c -f -h -o"
            files=yes
            case $previous in
                -f | --format) is_value=yes words="csv json table value yaml" files= ;;
                -c | --column) is_value=yes words="" files= ;;
                --quote) is_value=yes words="all minimal none nonnumeric" files= ;;
                --max-width) is_value=yes words="" files= ;;
                --sort-column) is_value=yes words="" files= ;;
                --disk-format) is_value=yes words="qcow2 raw" files= ;;
                --state) is_value=yes words="thin reserved mapped preallocated error" files= ;;
                -o | --output) is_value=yes words= files=yes ;;
            esac
            ;;
        thin)
            options="--column --disk-format --fit-width --format --help --long --max-width --noindent \
            --print-empty --quote --rate --rewrite --sort-ascending --sort-column \
            --sort-descending -c -f -h"
            files=yes
            case $previous in
                -f | --format) is_value=yes words="csv json table value yaml" files= ;;
                -c | --column) is_value=yes words="" files= ;;
                --quote) is_value=yes words="all minimal none nonnumeric" files= ;;
                --max-width) is_value=yes words="" files= ;;
                --sort-column) is_value=yes words="" files= ;;
                --disk-format) is_value=yes words="qcow2 raw" files= ;;
                --rate) is_value=yes words="" files= ;;
            esac
            ;;
    esac
    if [[ -z $is_value && $previous != -- && $cur == -* ]]; then
        words=$options files=
    fi
    if [[ -n $words ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    elif [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    fi
}

complete -F _imgprealloc imgprealloc
