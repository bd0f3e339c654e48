package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDocument(t *testing.T) {
	const in = "# Title\n\nSee [names](#names) and\n[RFC](https://example.com/rfc).\n\n## Fields\n\n" +
		"| field | value | if left out |\n|---|---|---|\n| `a` | one \\| two | – |\n| | more | |\n| `b` | [three](x.md) | four |\n\n" +
		"```yaml\n# kept\n| kept |\n```\n"
	const want = "# NAME\n\nsluice-x - be x\n\n# DESCRIPTION\n" +
		"\nSee names and\nRFC (https://example.com/rfc).\n\n## Fields\n\n" +
		"`a`\n: one | two; more\n\n`b`\n: three. If left out: four\n\n\n" +
		"```yaml\n# kept\n| kept |\n```\n\n"
	got, err := document("sluice-x", "be x", in)
	if err != nil || got != want {
		t.Errorf("%v\n%q\nwant\n%q", err, got, want)
	}
}

func TestPolicyPage(t *testing.T) {
	dir := t.TempDir()
	if err := (title{"2026-01-02", "sluice 1"}).run("sluice-policy.5", "policy files", []string{dir, "../../docs/policy.md"}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "sluice-policy.5"))
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	for _, want := range []string{`.TH sluice-policy 5 "2026-01-02" "sluice 1" "Sluice manual"`, ".SH NAME\nsluice-policy \\- policy files\n", ".SH Rules by domain", "apiVersion: sluice.dev/v1alpha1"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, refused := range []string{".TS", "](", `\[la]`} {
		if strings.Contains(page, refused) {
			t.Errorf("the page has %q", refused)
		}
	}
}
