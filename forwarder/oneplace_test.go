package forwarder

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestAdmissionIsInOnePlace looks for what only package admit may do. A decision made in one place
// cannot differ in another.
func TestAdmissionIsInOnePlace(t *testing.T) {
	only := regexp.MustCompile(`\b[rR](ules)?\.Decide\(|\.Acquire\(|nat\.Spec\{|\.Describe\(|\.Charge\(|\bJudged\{|passAlive`)
	found := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i, line := range strings.Split(string(text), "\n") {
			code, _, _ := strings.Cut(line, "//")
			if what := only.FindString(code); what != "" {
				if filepath.Dir(path) != filepath.Join("internal", "admit") {
					t.Errorf("%s:%d: %s belongs in package admit", path, i+1, what)
				}
				found++
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if found < 8 {
		t.Errorf("only %d places were found: the expression has gone stale", found)
	}
}
