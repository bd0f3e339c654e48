package sluice

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// reasonsIn are the values of a file's string constants whose names begin so.
func reasonsIn(t *testing.T, file string, prefixes ...string) map[string]bool {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]bool)
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 || !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(spec.Names[0].Name, p) }) {
			return true
		}
		if lit, ok := spec.Values[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil && s != "" {
				found[s] = true
			}
		}
		return true
	})
	if len(found) == 0 {
		t.Fatalf("%s has no constants that begin with %v: has it moved?", file, prefixes)
	}
	return found
}

// TestEveryReasonIsInTheDocuments: docs/flow-log.md lists what can stand in a record as a reason,
// or as the rule of a DNS question, and nothing else.
func TestEveryReasonIsInTheDocuments(t *testing.T) {
	want := reasonsIn(t, "nat/reason.go", "Reason", "Err")
	maps.Copy(want, reasonsIn(t, "policy/seen.go", "Reason"))
	maps.Copy(want, reasonsIn(t, "forwarder/dns/gate.go", "rule"))
	maps.Copy(want, reasonsIn(t, "forwarder/dns/tunnel.go", "tunnel"))
	text, err := os.ReadFile("docs/flow-log.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Reasons\n")
	section, _, _ = strings.Cut(section, "\n## ")
	listed := make(map[string]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*`) \\|").FindAllStringSubmatch(section, -1) {
		for _, word := range regexp.MustCompile("`([^`]*)`").FindAllStringSubmatch(row[1], -1) {
			if listed[word[1]] {
				t.Errorf("%q is listed twice", word[1])
			}
			listed[word[1]] = true
		}
	}
	for _, r := range slices.Sorted(maps.Keys(want)) {
		if !listed[r] {
			t.Errorf("docs/flow-log.md says nothing of the reason %q", r)
		}
	}
	for _, r := range slices.Sorted(maps.Keys(listed)) {
		if !want[r] {
			t.Errorf("docs/flow-log.md lists %q, which nothing can be refused or end for", r)
		}
	}
}

// TestReasonsAreConstants: nat/reason.go has all of them, so that the list can be whole. A string
// would become a reason of its own accord.
func TestReasonsAreConstants(t *testing.T) {
	ends := []string{"abort", "abortdial", "abortlocked", "end", "fail", "expire", "release", "kill"}
	isReason := func(fields *ast.FieldList) bool {
		return fields != nil && slices.ContainsFunc(fields.List, func(f *ast.Field) bool {
			switch typ := f.Type.(type) {
			case *ast.SelectorExpr:
				return typ.Sel.Name == "Reason"
			case *ast.Ident:
				return typ.Name == "Reason"
			}
			return false
		})
	}
	looked := 0
	for _, pattern := range []string{"nat/*.go", "forwarder/*.go", "forwarder/internal/*/*.go", "sandbox/*.go", "sandbox/internal/*/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, name, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			literal := func(e ast.Expr) {
				looked++
				if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING && lit.Value != `""` {
					t.Errorf("%s: %s is no constant of nat/reason.go", fset.Position(e.Pos()), lit.Value)
				}
			}
			ast.Inspect(f, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr:
					if sel, ok := n.Fun.(*ast.SelectorExpr); ok && slices.Contains(ends, strings.ToLower(sel.Sel.Name)) {
						for _, arg := range n.Args {
							literal(arg)
						}
					}
				case *ast.FuncDecl:
					if isReason(n.Type.Results) && n.Body != nil {
						ast.Inspect(n.Body, func(n ast.Node) bool {
							if r, ok := n.(*ast.ReturnStmt); ok {
								for _, e := range r.Results {
									literal(e)
								}
							}
							return true
						})
					}
				}
				return true
			})
		}
	}
	if looked < 100 {
		t.Errorf("looked at %d places only: has something moved?", looked)
	}
}
