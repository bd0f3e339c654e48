package cmdline

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"
)

// ReferenceCommand prints the help of every command as Markdown, which hack/man turns into manual
// pages. It is for the build, so the help does not list it.
func ReferenceCommand() *cli.Command {
	return &cli.Command{
		Name: "reference", Usage: "write the help of every command as Markdown", ArgsUsage: "DIR", Hidden: true,
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return errors.New("reference: want a DIR")
			}
			for _, p := range everyPage(c.App) {
				file := filepath.Join(c.Args().First(), p.manual()+".1.md")
				if err := os.WriteFile(file, []byte(p.markdown()), 0o644); err != nil {
					return fmt.Errorf("write the reference: %w", err)
				}
			}
			return nil
		},
	}
}

// everyPage returns the pages of the program and of all its commands.
func everyPage(a *cli.App) []*page {
	pages := []*page{appPage(a)}
	var walk func(string, []*cli.Command)
	walk = func(parent string, commands []*cli.Command) {
		for _, c := range commands {
			name := parent + " " + c.Name
			pages = append(pages, newPage(name, c))
			walk(name, shown(c))
		}
	}
	walk(a.Name, shown(&cli.Command{Subcommands: a.Commands}))
	return pages
}

// manual returns the name of the command's manual page.
func (p *page) manual() string { return strings.ReplaceAll(p.name, " ", "-") }

// markdown returns the source of the command's manual page, with its sections in the order of
// man-pages(7). hack/man adds the title.
func (p *page) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# NAME\n\n%s - %s\n\n", p.manual(), escape(p.summary))
	fmt.Fprintf(&b, "# SYNOPSIS\n\n**%s** %s\n\n", p.name, escape(p.usage))
	if len(p.description) > 0 {
		b.WriteString("# DESCRIPTION\n\n")
	}
	for _, d := range p.description {
		if d.verbatim {
			b.WriteString(verbatim(d.lines))
			continue
		}
		b.WriteString(escape(strings.Join(d.lines, " ")) + "\n\n")
	}
	if len(p.commands) > 0 {
		b.WriteString("# COMMANDS\n\n")
	}
	for _, c := range p.commands {
		fmt.Fprintf(&b, "**%s**\n: %s. See **%s-%s**(1).\n\n", c.term, escape(c.text), p.manual(), c.term)
	}
	b.WriteString("# OPTIONS\n\n")
	for _, c := range p.categories {
		if c.name != "" {
			fmt.Fprintf(&b, "### %s options\n\n", strings.ToUpper(c.name[:1])+c.name[1:])
		} else if len(p.categories) > 1 {
			b.WriteString("### Other options\n\n")
		}
		for _, o := range c.options {
			term := "**" + strings.Join(o.names, "**, **") + "**"
			if o.value != "" {
				term += " *" + escape(o.value) + "*"
			}
			fmt.Fprintf(&b, "%s\n: %s\n\n", term, escape(o.text))
		}
	}
	if len(p.examples) > 0 {
		b.WriteString("# EXAMPLES\n\n" + verbatim(p.examples))
	}
	b.WriteString("# SEE ALSO\n\n" + strings.Join(p.seeAlso(), ", ") + "\n")
	return b.String()
}

// seeAlso names the pages of the programs, of the parent command and of policy files.
func (p *page) seeAlso() (out []string) {
	words := strings.Fields(p.name)
	above := []string{"sluice", "sluice-cni"}
	if len(words) > 2 {
		above = append(above, strings.Join(words[:len(words)-1], "-"))
	}
	for _, name := range above {
		if name != p.manual() {
			out = append(out, "**"+name+"**(1)")
		}
	}
	return append(out, "**sluice-policy**(5)")
}

func verbatim(lines []string) string {
	return "```\n" + strings.Join(lines, "\n") + "\n```\n\n"
}

// escape keeps Markdown from reading text as markup.
func escape(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strings.ContainsRune("\\`*_{}[]<>|~&", r) {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return b.String()
}
