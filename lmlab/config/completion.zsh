# Completes commands of lmlab, and the overrides of train, evaluate and preview. For ~/.zshrc:
#   eval "$(python -m lmlab.train -sc install=zsh)"
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_lmlab() {
    local -a line run candidates
    line=("${(@)words[1,CURRENT-1]}")
    while [[ ${line[1]} == [A-Za-z_]*=* ]]; do shift line; done  # variables in front
    # python -m lmlab VERB is python -m lmlab.VERB
    [[ "${line[2,3]}" == "-m lmlab" ]] && (( $#line > 3 )) && line=("${(@)line[1,2]}" "lmlab.${line[4]}" "${(@)line[5,-1]}")
    if [[ ${line[2]} == -m && ${line[3]} == lmlab.(train|evaluate|preview) ]]; then
        run=("${(@)line[1,3]}")
    elif [[ ${line[1]:t} == lmlab && ${line[2]} == (train|evaluate|preview) ]]; then
        run=("${(@)line[1,2]}")
    elif [[ ${line[1]:t} == lmlab ]]; then
        candidates=(${(f)"$(${~line[1]} | sed -n 's/^  \([a-z]*\) .*/\1/p')"})
        (( $#line == 1 )) && compadd -- $candidates || _files
        return
    else
        _python "$@"  # zsh's own
        return
    fi
    # query=fish gives a candidate per line.
    candidates=("${(@f)$(COMP_LINE="lmlab ${line[$#run+1,-1]} $PREFIX" \
        ${~run[1]} "${(@)run[2,-1]}" -sc query=fish 2> /dev/null)}")
    compadd -Q -S '' -- $candidates || _files
}
compdef _lmlab python python3 lmlab
