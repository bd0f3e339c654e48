package cmdline

import (
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

// The scripts ask the binary itself: with --generate-bash-completion as its last argument,
// urfave/cli prints the words that can stand there. If "--" is among the arguments, it runs the
// command instead. The scripts therefore complete what follows "--" as the other command that it
// is, and pass "--" itself as "-".
const bashCompletion = `# bash completion for NAME: source <(NAME completion bash)
_FUNCTION() {
	local cur="${COMP_WORDS[COMP_CWORD]}" i words
	COMPREPLY=()
	for ((i = 1; i < COMP_CWORD; i++)); do
		if [[ "${COMP_WORDS[i]}" == -- ]]; then
			if declare -F _command_offset >/dev/null; then
				_command_offset $((i + 1))
			fi
			return
		fi
	done
	local line=("${COMP_WORDS[@]:0:COMP_CWORD}")
	case "$cur" in
	--) line+=(-) ;;
	-*) line+=("$cur") ;;
	esac
	words="$("${line[@]}" --generate-bash-completion 2>/dev/null)"
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}
complete -o bashdefault -o default -F _FUNCTION NAME
`

const zshCompletion = `#compdef NAME
# zsh completion for NAME: NAME completion zsh > "${fpath[1]}/_NAME"
_FUNCTION() {
	local cur="${words[CURRENT]}" end
	local -a line found
	line=("${(@)words[1,CURRENT-1]}")
	end=${line[(i)--]}
	if ((end < CURRENT)); then
		shift $end words
		((CURRENT -= end))
		_normal
		return
	fi
	case "$cur" in
	--) line+=(-) ;;
	-*) line+=("$cur") ;;
	esac
	found=("${(@f)$("${line[@]}" --generate-bash-completion 2>/dev/null)}")
	if [[ -n "${found[1]}" ]]; then
		compadd -- "${found[@]}"
	else
		_files
	fi
}
if [[ "${funcstack[1]}" == _NAME ]]; then
	_FUNCTION "$@"
else
	compdef _FUNCTION NAME
fi
`

// CompletionCommand prints the completion script of a shell for the program called name.
func CompletionCommand(name string) *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print a shell completion script", ArgsUsage: "bash|zsh|fish",
		UsageText: "source <(" + name + " completion bash)\n" + name + " completion fish | source",
		BashComplete: func(c *cli.Context) {
			_, _ = fmt.Fprintln(c.App.Writer, "bash\nzsh\nfish")
		},
		Action: func(c *cli.Context) error {
			fill := strings.NewReplacer("FUNCTION", strings.ReplaceAll(name, "-", "_"), "NAME", name)
			var script string
			switch c.Args().First() {
			case "bash":
				script = fill.Replace(bashCompletion)
			case "zsh":
				script = fill.Replace(zshCompletion)
			case "fish":
				s, err := c.App.ToFishCompletion()
				if err != nil {
					return fmt.Errorf("completion: %w", err)
				}
				script = s
			default:
				return errors.New("completion: want bash, zsh or fish")
			}
			_, err := fmt.Fprint(c.App.Writer, script)
			return err
		},
	}
}
