package sandbox

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/tun"
)

// given returns a policy that was given.
func given(t *testing.T, text string) policy.Source {
	t.Helper()
	d, err := policy.NewDocument("test", []byte(text))
	testutil.Must(t, err)
	return policy.Given(d)
}

// noPolicy is the message of a sandbox without a given policy.
var noPolicy = channel.RulesMessage{Policy: policy.NotGiven(policy.Builtin{})}

// unparsed returns a policy damaged on its way, where only parsing shows it.
func unparsed(t *testing.T, text string) policy.Source {
	t.Helper()
	b, err := json.Marshal(map[string]any{"given": map[string]string{"name": "p.yaml", "text": text}})
	testutil.Must(t, err)
	var s policy.Source
	testutil.Must(t, json.Unmarshal(b, &s))
	return s
}

// damaged holds, as JSON, the forms of a policy that is damaged when it arrives. "" is a missing
// field.
var damaged = map[string]string{
	"nothing":                  "",
	"null":                     `null`,
	"an empty object":          `{}`,
	"an empty string":          `""`,
	"a string":                 `"apiVersion: sluice.dev/v1alpha1"`,
	"an empty document":        `{"given": {"name": "p", "text": ""}}`,
	"a document without text":  `{"given": {"name": "p"}}`,
	"a null document":          `{"given": null}`,
	"white space":              `{"given": {"name": "p", "text": " \n\t\n"}}`,
	"comments only":            `{"given": {"name": "p", "text": "# a\n# b\n"}}`,
	"a marker only":            `{"given": {"name": "p", "text": "---\n"}}`,
	"null as a document":       `{"given": {"name": "p", "text": "null\n"}}`,
	"an empty mapping":         `{"given": {"name": "p", "text": "{}\n"}}`,
	"a cut document":           `{"given": {"name": "p", "text": "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\n"}}`,
	"two documents":            `{"given": {"name": "p", "text": "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: a}\nspec: {}\n---\napiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: a}\nspec: {defaultAction: allow}\n"}}`,
	"bytes that were not text": `{"given": {"name": "p", "text": "apiVersion: sluice.dev/v1alpha1 # \ufffd\nkind: SandboxPolicy\nmetadata: {name: a}\nspec: {defaultAction: allow}\n"}}`,
	"a zero byte":              `{"given": {"name": "p", "text": "apiVersion: sluice.dev/v1alpha1\u0000\nkind: SandboxPolicy\nmetadata: {name: a}\nspec: {defaultAction: allow}\n"}}`,
	"both":                     `{"given": {"name": "p", "text": "x"}, "notGiven": {}}`,
	"the form of before":       `{"name": "p", "source": ""}`,
	"an unknown field":         `{"notGiven": {}, "open": true}`,
}

// member returns a JSON object's member of that name, or nothing.
func member(name, value string) string {
	if value == "" {
		return ""
	}
	return `"` + name + `": ` + value
}

// However a policy is damaged between the flag and the worker, the result is an error: in the
// message to a running worker, in the configuration of a restarted one, in that of a pod's monitor,
// in what one binary leaves to the next, and in what was kept.
func TestADamagedPolicyIsNeverNone(t *testing.T) {
	for name, value := range damaged {
		t.Run(name, func(t *testing.T) {
			rules := `{` + member("policy", value) + `}`
			for place, compile := range map[string]func() error{
				"rules": func() error {
					var r channel.RulesMessage
					if err := json.Unmarshal([]byte(rules), &r); err != nil {
						return err
					}
					_, err := r.Compile()
					return err
				},
				"worker's configuration": func() error {
					var c channel.WorkerConfig
					if err := json.Unmarshal([]byte(`{"rules": `+rules+`}`), &c); err != nil {
						return err
					}
					_, err := c.Rules.Compile()
					return err
				},
				"monitor's configuration": func() error {
					var s attachmentStart
					if err := json.Unmarshal([]byte(`{"config": {`+member("policy", value)+`}}`), &s); err != nil {
						return err
					}
					_, err := channel.RulesMessage{Policy: s.Config.Policy}.Compile()
					return err
				},
				"upgrade": func() error {
					var s attachmentStart
					if err := json.Unmarshal([]byte(`{"resume": {"rules": `+rules+`}}`), &s); err != nil {
						return err
					}
					_, err := s.Resume.Rules.Compile()
					return err
				},
				"kept": func() error {
					fields := `"generation": 1`
					if value != "" {
						fields += `, ` + member("policy", value)
					}
					k, err := decodeKept([]byte(`{` + fields + `}`))
					if err != nil {
						return err
					}
					_, err = channel.RulesMessage{Policy: k.Policy}.Compile()
					return err
				},
			} {
				if err := compile(); err == nil {
					t.Errorf("%s: it makes rules", place)
				}
			}
		})
	}
}

func TestAPolicyWithoutASourceIsNotSent(t *testing.T) {
	if b, err := json.Marshal(channel.RulesMessage{}); err == nil {
		t.Errorf("encoded as %s", b)
	}
}

func TestWhatWasKeptIsAllThereOrAnError(t *testing.T) {
	const ok = `{"given": {"name": "p", "text": "apiVersion: sluice.dev/v1alpha1\nkind: SandboxPolicy\nmetadata: {name: a}\nspec: {}\n"}}`
	for _, row := range []struct {
		name, text string
		good       bool
	}{
		{"a policy", `{"policy": ` + ok + `, "generation": 2}`, true},
		{"a tunable", `{"sysctls": {"a": "1"}}`, true},
		{"no byte", "", false},
		{"white space", " \n", false},
		{"nothing said", "{}", false},
		{"null", "null", false},
		{"a policy that was never set", `{"policy": ` + ok + `}`, false},
		{"a policy that is missing", `{"generation": 2, "sysctls": {"a": "1"}}`, false},
		{"an unknown field", `{"sysctls": {"a": "1"}, "x": 1}`, false},
		{"a second value", `{"sysctls": {"a": "1"}} {}`, false},
	} {
		if _, err := decodeKept([]byte(row.text)); (err == nil) != row.good {
			t.Errorf("%s: %v", row.name, err)
		}
	}
}

// If the kept policy of a pod is damaged, the pod does not return with the one of its
// configuration: it has no monitor, and so no network.
func TestAPodIsNotOpenedByWhatItsKeptFileLost(t *testing.T) {
	for name, text := range map[string]string{
		"no byte":           "",
		"nothing said":      "{}",
		"no policy in it":   `{"generation": 1}`,
		"an empty document": `{"generation": 1, "policy": {"given": {"name": "closed", "text": ""}}}`,
		"the old form":      `{"generation": 1, "policy": {"name": "closed", "source": ""}}`,
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, tun.TAP)
			cfg := p.config(t)
			cfg.Keep = filepath.Join(t.TempDir(), "set.json")
			pid, client := attach(t, cfg)
			call(t, client, api.MethodPolicySet, api.PolicySetParams{Name: "closed", Source: closedPolicy}, nil)
			testutil.Must(t, syscall.Kill(pid, unix.SIGKILL))
			isGone(t, pid)
			testutil.Must(t, os.WriteFile(cfg.Keep, []byte(text), 0o600))
			if _, _, err := LaunchAttachment(context.Background(), "", cfg); err == nil || !strings.Contains(err.Error(), "remove "+cfg.Keep) {
				t.Errorf("it says %v", err)
			}
		})
	}
}

// The control API takes a whole policy, or leaves the current one in force.
func TestPolicySetTakesNothingForAPolicy(t *testing.T) {
	r := start(t, Config{Policy: given(t, closedPolicy)})
	for name, text := range map[string]string{
		"no byte": "", "white space": " \n", "comments": "# x\n", "a marker": "---\n", "null": "null\n", "an empty mapping": "{}",
		"a zero byte": closedPolicy + "\x00", "a byte order mark": "\ufeff" + closedPolicy, "not UTF-8": closedPolicy + "# \xff\n",
		"a second document": closedPolicy + "---\n" + closedPolicy, "too large": closedPolicy + strings.Repeat("#\n", policy.MaxPolicyBytes/2),
		"cut": closedPolicy[:len(closedPolicy)/2],
	} {
		err := r.client.Call(context.Background(), api.MethodPolicySet, api.PolicySetParams{Name: "p", Source: text}, nil)
		if err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	var now api.PolicyResult
	r.call(t, api.MethodPolicyShow, nil, &now)
	if now.Source != closedPolicy || now.Generation != 0 {
		t.Errorf("in force is %+v", now)
	}
}
