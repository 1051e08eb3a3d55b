# Completes the overrides of python -m lmlab.train, evaluate and preview. For ~/.bashrc:
#   eval "$(python -m lmlab.train -sc install=bash)"
_lmlab() {
    local line=${COMP_LINE:0:COMP_POINT} candidates
    COMPREPLY=()
    [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+-m[[:space:]]+lmlab\.(train|evaluate|preview)[[:space:]] ]] || return
    # Quotes are the shell's; Hydra splits at spaces. query=fish gives a candidate per line.
    mapfile -t candidates < <(COMP_LINE="lmlab ${line:${#BASH_REMATCH[0]}}" \
        "${BASH_REMATCH[1]/#\~/$HOME}" -m "lmlab.${BASH_REMATCH[2]}" -sc query=fish 2> /dev/null)
    local word=${line##*[[:space:]]} before=
    # Where = divides words, as it does unless somebody changed that, bash has the part behind it completed.
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && before=${word%"${word##*=}"}
    local candidate
    for candidate in "${candidates[@]}"; do
        [[ $candidate == "$word"* ]] && COMPREPLY+=("${candidate#"$before"}")
    done
}
complete -o nospace -o bashdefault -o default -F _lmlab python python3
