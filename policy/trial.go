package policy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Trial asks what a policy would do with a hypothetical flow: to a name or an address, or from a
// client of a published port. It assumes what it is not told, and says so.
type Trial struct {
	Host               string     // a name or an address; unused for ingress
	Client             netip.Addr // for ingress
	Address            netip.Addr // what the name resolves to; by default a public address that no rule names
	Proto              Protocol
	Port               uint16
	ICMPType, ICMPCode uint8
	Said               *string // the name in the first bytes; nil means the host's
	Method, Path       string  // of a request; empty means GET /
}

// TrialResult is the outcome of a Trial.
type TrialResult struct {
	Name        *NameVerdict // whether the name may be asked; nil if there is no name
	Explanation              // of the flow; empty if the name may not be asked
	Assumed     []string
}

// Allowed reports whether the flow would pass.
func (r *TrialResult) Allowed() bool { return r.Verdict.Allowed() }

// trialAddr is the default address of a name: TEST-NET-1, where no host is.
var trialAddr = netip.AddrFrom4([4]byte{192, 0, 2, 1})

// Run judges the trial.
func (t Trial) Run(p *Policy, env Environment) (*TrialResult, error) {
	rules, err := Compile(p, env)
	if err != nil {
		return nil, err
	}
	out := &TrialResult{}
	q := Query{Proto: uint8(t.Proto), ICMPType: t.ICMPType, ICMPCode: t.ICMPCode}
	if t.Client.IsValid() {
		q.Ingress, q.Src, q.Dst = true, netip.AddrPortFrom(t.Client, 1), netip.AddrPortFrom(trialAddr, t.Port)
		return out, out.explain(p, env, q)
	}
	name := ""
	a, err := netip.ParseAddr(t.Host)
	if err != nil {
		if name, err = NormalizeName(t.Host); err != nil {
			return nil, fmt.Errorf("%q is no address, and as a name: %w", t.Host, err)
		}
		if a = t.Address; !a.IsValid() {
			a = trialAddr
			out.assume("%s resolves to a public address that no rule names, such as %v", name, a)
		}
		v := rules.DecideName(name)
		if out.Name = &v; !v.Allowed {
			return out, nil
		}
	} else if t.Address.IsValid() {
		return nil, errors.New("an address resolves to no other")
	}
	q.Dst = netip.AddrPortFrom(a, t.Port)
	if name != "" {
		q.Names, q.Now = NewNames(NamesConfig{}), time.Unix(1, 0)
		if out.Name.Grants {
			if err := q.Names.Grant(name, []netip.Addr{a}, time.Minute, q.Now); err != nil {
				return nil, err
			}
		}
	}
	if verify := rules.Decide(q).Verify(); verify != VerifyNone {
		if q.Seen, err = t.seen(verify, name, out); err != nil {
			return nil, err
		}
	}
	return out, out.explain(p, env, q)
}

// seen makes up the first bytes of the flow.
func (t Trial) seen(verify Verify, name string, out *TrialResult) (Seen, error) {
	s := Seen{Kind: SeenTLS, Name: name, Nameless: name == ""}
	if t.Said != nil {
		s.Name, s.Nameless = "", *t.Said == ""
		if *t.Said != "" {
			n, err := NormalizeSaid(*t.Said)
			if err != nil {
				return s, fmt.Errorf("the name in the first bytes: %w", err)
			}
			s.Name = n
		}
	}
	switch {
	case t.Proto == UDP:
		s.Kind = SeenQUIC
	case verify == VerifyRequest, t.Method != "", t.Path != "", t.Port == 80:
		s.Kind, s.Method, s.Path = SeenHTTP, cmp.Or(t.Method, "GET"), cmp.Or(t.Path, "/")
	}
	what := s.Kind.String()
	if s.Kind == SeenHTTP {
		what = fmt.Sprintf("%s %s %s", what, s.Method, s.Path)
	}
	out.assume("the first bytes are %s and say the name %q", what, s.Name)
	return s, nil
}

func (r *TrialResult) explain(p *Policy, env Environment, q Query) error {
	x, err := Explain(p, env, q)
	if err == nil {
		r.Explanation = *x
	}
	return err
}

func (r *TrialResult) assume(format string, args ...any) {
	r.Assumed = append(r.Assumed, fmt.Sprintf(format, args...))
}
