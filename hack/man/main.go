// Command man renders manual pages.
//
//	man [-date D] [-source S] DIR NAME.SECTION.md...
//	man [-date D] [-source S] -page NAME.SECTION -summary TEXT DIR FILE
//
// The first form renders pages that the binaries wrote (`sluice reference`), the second a document
// of docs/. go-md2man turns the Markdown into roff. A document is written for a browser, so it is
// adapted first: it gets a NAME section, its tables, which are wider than a terminal, become lists
// of definitions, and its links become text.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/cpuguy83/go-md2man/v2/md2man"
)

// title holds what the first and last lines of a page show beside its name.
type title struct{ date, source string }

func main() {
	var t title
	flag.StringVar(&t.date, "date", "", "the date of the pages")
	flag.StringVar(&t.source, "source", "", "the version that the pages describe, such as sluice 1.0")
	page := flag.String("page", "", "the page that a document becomes, such as sluice-policy.5")
	summary := flag.String("summary", "", "the document's line in the NAME section")
	flag.Parse()
	if err := t.run(*page, *summary, flag.Args()); err != nil {
		fmt.Fprintf(os.Stderr, "man: %v\n", err)
		os.Exit(1)
	}
}

func (t title) run(page, summary string, args []string) error {
	if len(args) < 2 || page != "" && len(args) != 2 {
		return errors.New("want a directory and files, or with -page one file")
	}
	for _, file := range args[1:] {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		out, text := strings.TrimSuffix(filepath.Base(file), ".md"), string(b)
		if page != "" {
			out = page
		}
		name, section, ok := strings.Cut(out, ".")
		if !ok {
			return fmt.Errorf("%s: %s has no section", file, out)
		}
		if page != "" {
			if text, err = document(name, summary, text); err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
		}
		text = fmt.Sprintf("%% %s %s %q %q \"Sluice manual\"\n\n%s", name, section, t.date, t.source, text)
		if err := os.WriteFile(filepath.Join(args[0], out), md2man.Render([]byte(text)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// document turns a document into the source of a page called name.
func document(name, summary, text string) (string, error) {
	var b, prose strings.Builder
	fmt.Fprintf(&b, "# NAME\n\n%s - %s\n\n# DESCRIPTION\n", name, summary)
	flush := func() {
		b.WriteString(plainLinks(prose.String()))
		prose.Reset()
	}
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		l := lines[i]
		switch {
		case strings.HasPrefix(l, "```"):
			flush()
			b.WriteString(l + "\n")
			for i++; i < len(lines) && lines[i] != "```"; i++ {
				b.WriteString(lines[i] + "\n")
			}
			b.WriteString("```\n")
		case strings.HasPrefix(l, "# "):
			// The page has a title of its own.
		case strings.HasPrefix(l, "|"):
			flush()
			var rows [][]string
			for ; i < len(lines) && strings.HasPrefix(lines[i], "|"); i++ {
				rows = append(rows, cells(plainLinks(lines[i])))
			}
			i--
			if len(rows) < 3 {
				return "", fmt.Errorf("line %d: a table without rows", i+1)
			}
			definitions(&b, rows[0], rows[2:])
		default:
			prose.WriteString(l + "\n")
		}
	}
	flush()
	return b.String(), nil
}

var link = regexp.MustCompile(`\[([^\]]+)\]\(([^)]+)\)`)

// plainLinks replaces a link by its text, followed by the address if that is on the web.
func plainLinks(text string) string {
	return link.ReplaceAllStringFunc(text, func(l string) string {
		m := link.FindStringSubmatch(l)
		if strings.Contains(m[2], "://") {
			return m[1] + " (" + m[2] + ")"
		}
		return m[1]
	})
}

// cells splits a row of a table. A bar after a backslash stays in its cell.
func cells(row string) (out []string) {
	row = strings.ReplaceAll(strings.Trim(strings.TrimSpace(row), "|"), `\|`, "\x00")
	for c := range strings.SplitSeq(row, "|") {
		out = append(out, strings.TrimSpace(strings.ReplaceAll(c, "\x00", "|")))
	}
	return out
}

// definitions writes a table as a list. The first column is the term, the second its definition,
// and the others follow with their headings. A row without a first cell continues the one before.
func definitions(b *strings.Builder, head []string, rows [][]string) {
	for i, row := range rows {
		switch {
		case row[0] == "":
			b.WriteString("; ")
		case i > 0:
			b.WriteString("\n\n" + row[0] + "\n: ")
		default:
			b.WriteString(row[0] + "\n: ")
		}
		var text []string
		for j, cell := range row[1:] {
			heading := head[j+1]
			switch {
			case cell == "" || cell == "–":
			case j == 0 && (heading == "value" || heading == "unit"):
				text = append(text, cell)
			default:
				text = append(text, strings.ToUpper(heading[:1])+heading[1:]+": "+cell)
			}
		}
		if len(text) == 0 {
			text = []string{"–"}
		}
		b.WriteString(strings.Join(text, ". "))
	}
	b.WriteString("\n\n")
}
