# Completes the overrides of python -m lmlab.train, evaluate and preview. For ~/.config/fish/config.fish:
#   python -m lmlab.train -sc install=fish | source
function __lmlab_verb
    set -l words (commandline -opc)
    test (count $words) -ge 3; and test "$words[2]" = -m; and string match -qr '^lmlab\.(train|evaluate|preview)$' -- $words[3]
end
function __lmlab_candidates
    set -l words (commandline -opc)
    set -lx COMP_LINE "lmlab $words[4..-1] "(commandline -ct)
    eval $words[1] -m $words[3] -sc query=fish 2> /dev/null
end
for name in python python3
    complete -c $name -n __lmlab_verb -f -a '(__lmlab_candidates)'
end
