// Package cmdline holds what the command lines of both binaries share: version, help, shell
// completions and the source of the manual pages. It knows urfave/cli and nothing about sluice.
//
// A command is described once, in its cli.Command:
//
//	Usage        one line: what the command does
//	ArgsUsage    its arguments
//	UsageText    examples, one a line; a line that begins with # explains the next
//	Description  paragraphs, which are wrapped; an indented line stays as it is
//	Flags        grouped by InCategory, in the order in which the help prints them
//
// page reads that description; help.go and reference.go print it.
package cmdline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// InCategory puts flags into a category of the help, such as "network".
func InCategory(name string, flags ...cli.Flag) []cli.Flag {
	for _, f := range flags {
		switch f := f.(type) {
		case *cli.BoolFlag:
			f.Category = name
		case *cli.IntFlag:
			f.Category = name
		case *cli.StringFlag:
			f.Category = name
		case *cli.StringSliceFlag:
			f.Category = name
		default:
			panic(fmt.Sprintf("cmdline: a flag of type %T has no category", f))
		}
	}
	return flags
}

// page is one command's help.
type page struct {
	name        string // "sluice policy test"
	summary     string
	usage       string // what follows the name
	examples    []string
	description []paragraph
	commands    []entry
	categories  []category
}

// paragraph is text to wrap, or lines that stay as they are.
type paragraph struct {
	lines    []string
	verbatim bool
}

// entry is a term and what it means.
type entry struct{ term, text string }

// category is the options under one heading.
type category struct {
	name    string // empty for options without a category
	options []option
}

type option struct {
	names []string // "--name", "-n"
	value string   // placeholder of the value; empty for a switch
	text  string
}

// appPage describes a whole program.
func appPage(a *cli.App) *page {
	return newPage(a.Name, &cli.Command{
		Usage: a.Usage, UsageText: a.UsageText, ArgsUsage: a.ArgsUsage, Description: a.Description,
		Subcommands: a.Commands, Flags: a.Flags,
	})
}

// newPage describes the command invoked as name.
func newPage(name string, c *cli.Command) *page {
	p := &page{name: name, summary: c.Usage, usage: c.ArgsUsage, description: paragraphs(c.Description)}
	if c.UsageText != "" {
		p.examples = strings.Split(c.UsageText, "\n")
	}
	for _, sub := range shown(c) {
		p.commands = append(p.commands, entry{sub.Name, sub.Usage})
	}
	switch {
	case len(p.commands) > 0:
		p.usage = "COMMAND [flags] [arguments]"
	case hasFlags(c):
		p.usage = strings.TrimRight("[flags] "+p.usage, " ")
	}
	for _, f := range c.Flags {
		o, category := newOption(f)
		if o.names[0] != "--help" {
			p.add(category, o)
		}
	}
	p.add("", option{names: []string{"--help", "-h"}, text: "show this help"})
	return p
}

// shown returns the commands that the help lists: neither the hidden ones nor the one called help
// that the library adds to each command.
func shown(c *cli.Command) []*cli.Command {
	return slices.DeleteFunc(slices.Clone(c.Subcommands), func(s *cli.Command) bool { return s.Hidden || s.Name == "help" })
}

func hasFlags(c *cli.Command) bool {
	return slices.ContainsFunc(c.Flags, func(f cli.Flag) bool { return f != cli.HelpFlag })
}

// add files an option under its category. Categories stay in the order of their first option;
// options without a category come last.
func (p *page) add(name string, o option) {
	for i := range p.categories {
		if p.categories[i].name == name {
			p.categories[i].options = append(p.categories[i].options, o)
			return
		}
	}
	p.categories = append(p.categories, category{name, []option{o}})
}

// newOption reads a flag. Its usage text holds the placeholder in backquotes.
func newOption(f cli.Flag) (o option, category string) {
	for _, n := range f.Names() {
		o.names = append(o.names, strings.Repeat("-", min(len(n), 2))+n)
	}
	if c, ok := f.(cli.CategorizableFlag); ok {
		category = c.GetCategory()
	}
	doc, ok := f.(cli.DocGenerationFlag)
	if !ok {
		return o, category
	}
	before, rest, quoted := strings.Cut(doc.GetUsage(), "`")
	placeholder, after, _ := strings.Cut(rest, "`")
	o.text = before + placeholder + after
	if !doc.TakesValue() {
		return o, category
	}
	o.value = "VALUE"
	if quoted {
		o.value = placeholder
	}
	if v := defaultOf(doc); v != "" && !strings.Contains(o.text, "default") {
		o.text += " (default: " + v + ")"
	}
	return o, category
}

// defaultOf returns the default to print. A flag whose default is not a value, or depends on the
// machine, states it in its DefaultText.
func defaultOf(doc cli.DocGenerationFlag) string {
	text := doc.GetValue()
	if s, ok := doc.(*cli.StringFlag); ok && s.DefaultText != "" {
		text = s.DefaultText
	}
	if i, ok := doc.(*cli.IntFlag); ok && i.DefaultText != "" {
		text = i.DefaultText
	}
	if text == "0" || text == "[]" {
		return ""
	}
	return text
}

func paragraphs(text string) (out []paragraph) {
	for _, block := range strings.Split(strings.Trim(text, "\n"), "\n\n") {
		if block == "" {
			continue
		}
		lines := strings.Split(block, "\n")
		p := paragraph{verbatim: strings.HasPrefix(block, " ")}
		for _, l := range lines {
			p.lines = append(p.lines, strings.TrimSpace(l))
		}
		out = append(out, p)
	}
	return out
}
