package sandbox

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/forwarder"
	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/flowlog"
)

func TestRefusalsOfTheDefaultNameTheirFlagOnce(t *testing.T) {
	env := policy.Environment{Host: []netip.Prefix{netip.MustParsePrefix("2001:db8::5/128")}}
	for _, tt := range []struct {
		name string
		r    channel.RulesMessage
		want []string
	}{
		{"run without a policy", channel.RulesMessage{Policy: policy.NotGiven(policy.Builtin{}), Env: env}, []string{"TCP to 192.168.1.7 was refused: without a policy, --allow-private opens such addresses", "TCP to 2001:db8::5 was refused: without a policy, --allow-host opens such addresses"}},
		{"with one of the flags", channel.RulesMessage{Policy: policy.NotGiven(policy.Builtin{AllowHost: true}), Env: env}, []string{"TCP to 192.168.1.7 was refused: without a policy, --allow-private opens such addresses"}},
		{"a policy was given", channel.RulesMessage{Policy: given(t, closedPolicy), Env: env}, nil},
		{"a pod", channel.RulesMessage{Policy: policy.NotGiven(policy.Builtin{Pod: true}), Env: env}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rules, err := tt.r.Compile()
			if err != nil {
				t.Fatal(err)
			}
			var said []string
			h := flowlog.FlagHint{Warn: func(s string) { said = append(said, s) }}
			for range 3 {
				for _, to := range []string{"192.168.1.7:80", "10.0.0.1:80", "[2001:db8::5]:22", "169.254.169.254:80", "1.1.1.1:80"} {
					dst := netip.MustParseAddrPort(to)
					v := rules.Decide(policy.Query{Proto: unix.IPPROTO_TCP, Dst: dst})
					h.Refused(tt.r, forwarder.Refusal{Proto: unix.IPPROTO_TCP, Dst: dst, Verdict: v})
				}
			}
			if strings.Join(said, "\n") != strings.Join(tt.want, "\n") {
				t.Errorf("said %q\nwant %q", said, tt.want)
			}
		})
	}
}
