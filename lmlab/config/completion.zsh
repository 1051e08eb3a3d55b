# Completes the overrides of python -m lmlab.train, evaluate and preview. For ~/.zshrc:
#   eval "$(python -m lmlab.train -sc install=zsh)"
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_lmlab() {
    if (( CURRENT < 4 )) || [[ $words[2] != -m || $words[3] != lmlab.(train|evaluate|preview) ]]; then
        _python "$@"  # zsh's own
        return
    fi
    # query=fish gives a candidate per line.
    local -a candidates=("${(@f)$(COMP_LINE="lmlab ${words[4,CURRENT-1]} $PREFIX" \
        ${~words[1]} -m $words[3] -sc query=fish 2> /dev/null)}")
    compadd -Q -S '' -- $candidates || _files
}
compdef _lmlab python python3
