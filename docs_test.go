package sluice

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// markdown returns the project's Markdown files and their text.
func markdown(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "build" || d.Name() == "testdata"):
			return filepath.SkipDir
		case d.IsDir() || filepath.Ext(path) != ".md":
			return nil
		}
		b, err := os.ReadFile(path)
		files[path] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 3 {
		t.Fatalf("only %d Markdown files", len(files))
	}
	return files
}

var (
	fence   = regexp.MustCompile("(?ms)^```.*?^```")
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.*)$`)
)

// anchors returns the fragments that the headings of a page can be linked by, as forges make
// them: lower case, spaces as hyphens, nothing but letters, digits, hyphens and underscores.
func anchors(text string) (all []string) {
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		a := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || 'a' <= r && r <= 'z' || '0' <= r && r <= '9':
				return r
			}
			return -1
		}, strings.ToLower(m[1]))
		all = append(all, a)
	}
	return all
}

func TestAnchorsAreWhatForgesMakeOfHeadings(t *testing.T) {
	got := anchors("# One `two`, three\n```\n# not a heading\n```\n## HTTP/2 in clear text\n")
	if want := []string{"one-two-three", "http2-in-clear-text"}; !slices.Equal(got, want) {
		t.Errorf("anchors are %q, want %q", got, want)
	}
}

func TestRelativeLinksResolve(t *testing.T) {
	files := markdown(t)
	seen := 0
	for path, text := range files {
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			seen++
			name, fragment, hasFragment := strings.Cut(m[1], "#")
			target := path
			if name != "" {
				target = filepath.Join(filepath.Dir(path), name)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
				continue
			}
			if hasFragment && !slices.Contains(anchors(files[target]), fragment) {
				t.Errorf("%s links to %s, and %s has no such heading", path, m[1], target)
			}
		}
	}
	if seen < 10 {
		t.Errorf("only %d relative links were looked at", seen)
	}
}

var docPath = regexp.MustCompile(`\bdocs/[a-z-]+\.(md|svg)\b`)

// Help texts, comments and pages name pages of docs/ by path.
func TestNamedPagesExist(t *testing.T) {
	seen := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "build" || d.Name() == "testdata"):
			return filepath.SkipDir
		case d.IsDir() || !slices.Contains([]string{".go", ".md", ".sh", ".yaml"}, filepath.Ext(path)) && d.Name() != "Makefile":
			return nil
		}
		b, err := os.ReadFile(path)
		for _, name := range docPath.FindAllString(string(b), -1) {
			seen++
			if _, err := os.Stat(name); err != nil {
				t.Errorf("%s names %s: %v", path, name, err)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 10 {
		t.Errorf("only %d names of pages were looked at", seen)
	}
}

var (
	makeTarget = regexp.MustCompile("(?m)(?:^    (?:\\$ )?|`|&& )make((?: [a-z][a-z0-9-]*)+)")
	makeRule   = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`)
)

func TestNamedMakeTargetsExist(t *testing.T) {
	b, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	var rules []string
	for _, m := range makeRule.FindAllStringSubmatch(string(b), -1) {
		rules = append(rules, m[1])
	}
	seen := 0
	for path, text := range markdown(t) {
		for _, m := range makeTarget.FindAllStringSubmatch(text, -1) {
			for _, target := range strings.Fields(m[1]) {
				if seen++; !slices.Contains(rules, target) {
					t.Errorf("%s says `make %s`, which the Makefile does not have", path, target)
				}
			}
		}
	}
	if seen < 10 {
		t.Errorf("only %d targets were looked at", seen)
	}
}

const (
	architecture = "ARCHITECTURE.md"
	// mostFiles is how many files a walk may lead through.
	mostFiles = 8
)

var (
	code     = regexp.MustCompile("`([^`\n]+)`")
	goFile   = regexp.MustCompile(`^[a-z0-9_/]+\.go$`)
	function = regexp.MustCompile(`^(?:([A-Za-z0-9_]+)\.)?([A-Za-z0-9_]+)$`)
)

// functions returns what a file declares: functions as Name, methods as Type.Name.
func functions(t *testing.T, path string) (all []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Error(err)
		return nil
	}
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		name := fn.Name.Name
		if fn.Recv != nil {
			of := fn.Recv.List[0].Type
			if star, ok := of.(*ast.StarExpr); ok {
				of = star.X
			}
			if generic, ok := of.(*ast.IndexExpr); ok {
				of = generic.X
			}
			name = of.(*ast.Ident).Name + "." + name
		}
		all = append(all, name)
	}
	return all
}

// Each step of a walk names a file, and after it functions that this file declares.
func TestWalksNameFilesAndFunctionsAsTheyAre(t *testing.T) {
	text, err := os.ReadFile(architecture)
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## Three walks\n")
	if !ok {
		t.Fatalf("%s has no section \"Three walks\"", architecture)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	parts := strings.Split("\n"+section, "\n### ")[1:]
	if len(parts) != 3 {
		t.Errorf("%d walks, not three", len(parts))
	}
	for _, part := range parts {
		title, body, _ := strings.Cut(part, "\n")
		var files, declared []string
		steps := 0
		for _, m := range code.FindAllStringSubmatch(body, -1) {
			switch span := m[1]; {
			case goFile.MatchString(span):
				declared = functions(t, span)
				if !slices.Contains(files, span) {
					files = append(files, span)
				}
			case declared == nil:
				t.Errorf("%s: %s stands before the first file", title, span)
			case !function.MatchString(span):
				t.Errorf("%s: %s is neither a file nor a function: write it without backquotes", title, span)
			case !slices.Contains(declared, span):
				t.Errorf("%s: %s does not declare %s", title, files[len(files)-1], span)
			default:
				steps++
			}
		}
		if len(files) < 3 || len(files) > mostFiles || steps < len(files) {
			t.Errorf("%s: %d files and %d functions; want at most %d files, and a function of each", title, len(files), steps, mostFiles)
		}
	}
}
