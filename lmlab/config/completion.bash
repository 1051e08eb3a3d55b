# Completes commands of lmlab, and the overrides of train, evaluate and preview. For ~/.bashrc:
#   eval "$(python -m lmlab.train -sc install=bash)"
_lmlab() {
    local line=${COMP_LINE:0:COMP_POINT} space='[[:space:]]+' verbs='(train|evaluate|preview)' run candidates
    local first='^[[:space:]]*([A-Za-z_][A-Za-z0-9_]*=[^[:space:]]*[[:space:]]+)*'  # with variables in front
    COMPREPLY=()
    if [[ $line =~ $first([^[:space:]]+)${space}-m${space}lmlab(\.|$space)$verbs$space ]]; then
        run=("${BASH_REMATCH[2]/#\~/$HOME}" -m "lmlab.${BASH_REMATCH[4]}")
    elif [[ $line =~ $first([^[:space:]]*lmlab)$space$verbs$space ]]; then
        run=("${BASH_REMATCH[2]/#\~/$HOME}" "${BASH_REMATCH[3]}")
    elif [[ $line =~ $first([^[:space:]]*lmlab)$space[^[:space:]]*$ ]]; then
        mapfile -t candidates < <("${BASH_REMATCH[2]/#\~/$HOME}" | sed -n 's/^  \([a-z]*\) .*/\1 /p')
    else
        return
    fi
    # Quotes are the shell's; Hydra splits at spaces. query=fish gives a candidate per line.
    [[ ${run[*]} ]] && mapfile -t candidates < <(COMP_LINE="lmlab ${line:${#BASH_REMATCH[0]}}" \
        "${run[@]}" -sc query=fish 2> /dev/null)
    local word=${line##*[[:space:]]} before=
    # Where = divides words, as it does unless somebody changed that, bash has the part behind it completed.
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && before=${word%"${word##*=}"}
    local candidate
    for candidate in "${candidates[@]}"; do
        [[ $candidate == "$word"* ]] && COMPREPLY+=("${candidate#"$before"}")
    done
}
complete -o nospace -o bashdefault -o default -F _lmlab python python3 lmlab
