package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"
)

// The scripts ask the binary itself: urfave/cli answers a last argument of
// --generate-bash-completion with the words that can stand there.
const bashCompletion = `# bash completion for sluice: source <(sluice completion bash)
_sluice() {
	local cur words
	COMPREPLY=()
	cur="${COMP_WORDS[COMP_CWORD]}"
	if [[ "$cur" == -* ]]; then
		words="$("${COMP_WORDS[@]:0:COMP_CWORD}" "$cur" --generate-bash-completion 2>/dev/null)"
	else
		words="$("${COMP_WORDS[@]:0:COMP_CWORD}" --generate-bash-completion 2>/dev/null)"
	fi
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}
complete -o bashdefault -o default -F _sluice sluice
`

const zshCompletion = `#compdef sluice
# zsh completion for sluice: sluice completion zsh > "${fpath[1]}/_sluice"
_sluice() {
	local -a words_
	local cur="${words[-1]}"
	if [[ "$cur" == -* ]]; then
		words_=("${(@f)$(${words[@]:0:#words[@]-1} ${cur} --generate-bash-completion 2>/dev/null)}")
	else
		words_=("${(@f)$(${words[@]:0:#words[@]-1} --generate-bash-completion 2>/dev/null)}")
	fi
	if [[ -n "${words_[1]}" ]]; then
		_describe 'values' words_
	else
		_files
	fi
}
compdef _sluice sluice
`

func completionCommand() *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print a shell completion script", ArgsUsage: "bash|zsh|fish",
		Description: "   source <(sluice completion bash)",
		BashComplete: func(c *cli.Context) {
			_, _ = fmt.Fprintln(c.App.Writer, "bash\nzsh\nfish")
		},
		Action: func(c *cli.Context) error {
			var script string
			switch c.Args().First() {
			case "bash":
				script = bashCompletion
			case "zsh":
				script = zshCompletion
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
