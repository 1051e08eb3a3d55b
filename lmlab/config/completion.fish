# Completes commands of lmlab, and the overrides of train, evaluate and preview. For ~/.config/fish/config.fish:
#   python -m lmlab.train -sc install=fish | source
function __lmlab_words  # without variables in front, and with lmlab.VERB for lmlab VERB of python -m
    set -l words (commandline -opc)
    while string match -qr '^[A-Za-z_][A-Za-z0-9_]*=' -- $words[1]
        set -e words[1]
    end
    if test "$words[2..3]" = '-m lmlab'; and test (count $words) -ge 4
        set words $words[1..2] lmlab.$words[4] $words[5..-1]
    end
    printf '%s\n' $words
end
function __lmlab_run  # what answers for them
    set -l words $argv
    if test "$words[2]" = -m; and string match -qr '^lmlab\.(train|evaluate|preview)$' -- $words[3]
        printf '%s\n' $words[1..3]
    else if string match -qr '(^|/)lmlab$' -- $words[1]; and string match -qr '^(train|evaluate|preview)$' -- $words[2]
        printf '%s\n' $words[1..2]
    else
        return 1
    end
end
function __lmlab_candidates
    set -l words (__lmlab_words)
    set -l run (__lmlab_run $words)
    set -l rest (math (count $run) + 1)
    set -lx COMP_LINE "lmlab $words[$rest..-1] "(commandline -ct)
    eval $run -sc query=fish 2> /dev/null
end
for name in python python3 lmlab
    complete -c $name -n '__lmlab_run (__lmlab_words) > /dev/null' -f -a '(__lmlab_candidates)'
end
complete -c lmlab -n 'test (count (__lmlab_words)) -eq 1' -f -a '(lmlab | string replace -rf "^  ([a-z]+) .*" "\$1")'
