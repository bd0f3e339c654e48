package policy

import (
	"fmt"
	"net/netip"
	"strings"
)

// Explains a decision rule by rule. The engine itself judges each rule, alone in a policy of its
// own. A rule that does not match is judged again with one of its conditions removed, until it
// matches. So an explanation cannot differ from the decision.

// Step is the result of one rule for a flow.
type Step struct {
	Rule    string `json:"rule"`
	Action  Action `json:"action"`
	Decides bool   `json:"decides"`
	Why     string `json:"why"`
}

// Explanation is a verdict with the steps that led to it. The last step decided.
type Explanation struct {
	Verdict Verdict `json:"-"`
	Steps   []Step  `json:"steps"`
}

// Explain judges a flow under a policy and returns the reasons.
func Explain(p *Policy, env Environment, q Query) (*Explanation, error) {
	rules, err := Compile(p, env)
	if err != nil {
		return nil, err
	}
	x := &Explanation{Verdict: rules.Decide(q)}
	list := p.Spec.Egress
	if q.Ingress {
		list = p.ingressIn(env)
	}
	e := explainer{p: p, env: env, q: q}
	for i := range list {
		name := ruleName(q.Ingress, i, list[i].Name)
		step := Step{Rule: name, Action: list[i].Action, Decides: x.Verdict.rule == name}
		switch {
		case !step.Decides:
			if step.Why, err = e.whyNot(list[i]); err != nil {
				return nil, err
			}
		default:
			step.Why = "it matches" + because(x.Verdict)
		}
		x.Steps = append(x.Steps, step)
		if step.Decides {
			return x, nil
		}
	}
	last := Step{Rule: x.Verdict.rule, Action: x.Verdict.action, Decides: true, Why: "no rule matches"}
	if why, ok := builtinReasons[x.Verdict.rule]; ok {
		last.Why = why
	} else if x.Verdict.rule != ruleDefault {
		last.Why = "it is a special address, which no rule opens by name or as a part of a wider range"
	}
	x.Steps = append(x.Steps, last)
	return x, nil
}

var builtinReasons = map[string]string{
	rulePlainDNS:   "names are gated, so that DNS is answered inside, and no packet of it goes out",
	ruleDNSOverTLS: "names are gated, and no rule lists port 853 by itself",
	ruleDoH:        "names are gated, and no rule names this public resolver by its address or exact domain",
	ruleInvalid:    "it is no address",
	ruleZone:       "the address has a zone, which means nothing outside of the sandbox",
	rulePortZero:   "port 0 is reserved",
}

// because describes the rest of a verdict by a rule.
func because(v Verdict) string {
	switch {
	case v.verify == VerifyFirstBytes:
		return ", if the first bytes say a name that it has"
	case v.verify == VerifyRequest:
		return ", and judges each request"
	case v.reason == ReasonQUIC:
		return ", and wants TCP instead of QUIC"
	case v.reason == ReasonNotHTTP:
		return ", and lets only clear-text HTTP pass"
	case v.reason == ReasonRequest:
		return ", and does not list this method and path"
	case v.reason == ReasonOverride:
		return ", and passes no field by which a server may take the request for another one"
	case v.name != "":
		return " by the name " + v.name
	}
	return ""
}

type explainer struct {
	p   *Policy
	env Environment
	q   Query
}

// alone returns the verdict as if the rule were the only one.
func (e *explainer) alone(r Rule) (Verdict, error) {
	p := *e.p
	p.Spec.DefaultAction, p.Spec.Mode, p.Spec.Egress, p.Spec.Ingress = Drop, Enforce, nil, nil
	r.Name = ""
	if e.q.Ingress {
		p.Spec.Ingress = []Rule{r}
	} else {
		p.Spec.Egress = []Rule{r}
	}
	rules, err := Compile(&p, e.env)
	if err != nil {
		return Verdict{}, err
	}
	return rules.Decide(e.q), nil
}

// whyNot returns which of its conditions kept a rule from deciding.
func (e *explainer) whyNot(r Rule) (string, error) {
	v, err := e.alone(r)
	if err != nil {
		return "", err
	}
	first := ruleName(e.q.Ingress, 0, "")
	matched := func(v Verdict) bool { return v.rule == first }
	switch {
	case matched(v):
		return "it matches, but what is built in goes before it", nil
	case v.reason == ReasonNoName:
		why := "it fits the address and the port, but no name was said"
		if e.byGrant(r, e.q.Dst.Port()) {
			why += " (verify: grant would let it pass)"
		}
		return why, nil
	case v.reason == ReasonMismatch:
		return fmt.Sprintf("it fits the address and the port, but %s is not granted for the address, or not of the rule", e.q.Seen.Name), nil
	case v.reason == ReasonECH:
		return "it fits, but the hello has an encrypted one inside (ech: allow would let it pass)", nil
	case v.reason == ReasonPrivate:
		return "it fits, but the name leads to a private address (privateAddresses: allow would let it pass)", nil
	}
	anyPort := r
	anyPort.Ports, anyPort.ICMP, anyPort.HTTP = nil, nil, nil
	if v, err = e.alone(anyPort); err != nil {
		return "", err
	}
	if matched(v) || v.reason != ReasonNone {
		why := "it does not list this protocol and port"
		if e.ftpData(r) {
			why += "; if this is FTP's data, a rule with verify: grant has to list the server's passive ports"
		}
		return why, nil
	}
	if c, ok := strings.CutPrefix(v.rule, "special:"); ok {
		return fmt.Sprintf("the address is %s, which the rule does not name", c), nil
	}
	if len(domainsOf(r)) == 0 {
		return "the address is none of its peers", nil
	}
	granted := e.q.Names.Of(e.q.Dst.Addr(), e.q.Now, nil)
	if len(granted) == 0 {
		return "the address is none of its peers, and granted under no name", nil
	}
	return fmt.Sprintf("the address is none of its peers, and granted as %s, which it does not have", strings.Join(granted, ", ")), nil
}

// byGrant reports whether a rule would match at a port by verify: grant.
func (e *explainer) byGrant(r Rule, port uint16) bool {
	at := *e
	at.q.Dst = netip.AddrPortFrom(e.q.Dst.Addr(), port)
	r.Verify = VerifyRuleGrant
	v, err := at.alone(r)
	return err == nil && v.rule == ruleName(e.q.Ingress, 0, "") && v.Allowed()
}

// ftpData reports whether the flow may be a data connection of an FTP server to which the
// rule lets control connections pass.
func (e *explainer) ftpData(r Rule) bool {
	return !e.q.Ingress && Protocol(e.q.Proto) == TCP && e.q.Dst.Port() >= 1024 && len(domainsOf(r)) > 0 && e.byGrant(r, portFTP)
}

func domainsOf(r Rule) []string {
	var out []string
	for _, p := range r.To {
		if p.Domain != "" {
			out = append(out, p.Domain)
		}
	}
	return out
}
