// Package hack holds the tests of the Makefile.
package hack

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// run runs a program in the root of the repository and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = ".."
	// The variables of an outer make are not meant for this one.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "MFLAGS=") || strings.HasPrefix(v, "DESTDIR=") || strings.HasPrefix(v, "PREFIX=")
	})
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func TestMakeHelpNamesEveryTarget(t *testing.T) {
	b, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	phony := regexp.MustCompile(`(?m)^\.PHONY: (.*)$`).FindStringSubmatch(string(b))
	if phony == nil {
		t.Fatal("the Makefile has no .PHONY")
	}
	targets := strings.Fields(phony[1])
	for _, m := range regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`).FindAllStringSubmatch(string(b), -1) {
		if !slices.Contains(targets, m[1]) {
			t.Errorf("%s is not in .PHONY", m[1])
		}
	}
	help := run(t, "make", "-s", "help")
	for _, target := range targets {
		if !regexp.MustCompile(`(?m)^` + target + ` +\S`).MatchString(help) {
			t.Errorf("make help does not explain %s:\n%s", target, help)
		}
	}
}

func TestMakeInstall(t *testing.T) {
	dir := t.TempDir()
	run(t, "make", "-s", "install", "DESTDIR="+dir, "PREFIX=/opt/sluice")
	root := filepath.Join(dir, "opt/sluice")
	for file, want := range map[string]string{
		"share/man/man1/sluice.1":                      ".SH NAME",
		"share/man/man1/sluice-run.1":                  "Network options",
		"share/man/man1/sluice-policy-test.1":          ".SH EXAMPLES",
		"share/man/man1/sluice-cni-install.1":          "conflist",
		"share/man/man5/sluice-policy.5":               ".SH Rules by domain",
		"share/bash-completion/completions/sluice":     "complete ",
		"share/bash-completion/completions/sluice-cni": "-F _sluice_cni sluice-cni",
		"share/zsh/site-functions/_sluice":             "#compdef sluice\n",
		"share/zsh/site-functions/_sluice-cni":         "#compdef sluice-cni\n",
		"share/fish/vendor_completions.d/sluice.fish":  "complete ",
	} {
		if b, err := os.ReadFile(filepath.Join(root, file)); err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %v, want %q", file, err, want)
		}
	}
	stamp := strings.TrimSpace(run(t, filepath.Join(root, "bin/sluice-cni"), "version"))
	if got := run(t, filepath.Join(root, "bin/sluice"), "version"); !strings.HasPrefix(got, "sluice "+stamp+" (") {
		t.Errorf("sluice has the version %q, sluice-cni %q", got, stamp)
	}
	// The stamp comes from git or from make's VERSION: the binaries alone know no release.
	if stamp == "" || strings.HasPrefix(stamp, "devel") {
		t.Errorf("the binaries were not stamped: %q", stamp)
	}
	if page, err := os.ReadFile(filepath.Join(root, "share/man/man1/sluice-run.1")); err != nil || !strings.Contains(string(page), "\"sluice "+stamp+"\"") {
		t.Errorf("the manual is not of version %s: %v", stamp, err)
	}
	if names, err := filepath.Glob(dir + "/*"); err != nil || len(names) != 1 {
		t.Errorf("installed outside PREFIX: %q, %v", names, err)
	}
}
