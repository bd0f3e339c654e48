package policy

import (
	"fmt"
	"net/netip"
	"strings"

	"go.yaml.in/yaml/v3"

	"sluice.dev/sluice/internal/prefix"
)

func (p *parser) action(n *yaml.Node, what string) Action {
	if n.Kind == yaml.ScalarNode && (n.Value == "deny" || n.Value == "block") {
		p.errorf(n, "%s is %q; expected reject (refused at once) or drop (no answer)", what, n.Value)
		return Drop
	}
	return Action(max(0, p.word(n, what, actionNames)))
}

// rules returns a non-nil list: an empty list means something other than no list.
func (p *parser) rules(n *yaml.Node, direction string) []Rule {
	out := []Rule{}
	lines := make(map[string]int) // name → line
	p.list(n, direction, "rules", true, func(i int, item *yaml.Node) {
		what := fmt.Sprintf("%s[%d]", direction, i)
		rule, name := p.rule(item, what, direction == "ingress")
		if name != nil {
			if line, dup := lines[rule.Name]; dup {
				p.errorf(name, "%s is named %q like the rule on line %d; expected a name of its own", what, rule.Name, line)
			}
			lines[rule.Name] = name.Line
		}
		out = append(out, rule)
	})
	return out
}

// rule also returns the node of the rule's name, if the name is valid.
func (p *parser) rule(n *yaml.Node, what string, ingress bool) (out Rule, name *yaml.Node) {
	want := fmt.Sprintf("a name of letters, digits, -, _, . and /, at most %d", MaxRuleName)
	peers, foreign := field{"to", false, func(v *yaml.Node) { out.To = p.peers(v, "to") }}, "from"
	if ingress {
		peers, foreign = field{"from", false, func(v *yaml.Node) { out.From = p.peers(v, "from") }}, "to"
	}
	fields := []field{
		{"name", false, func(v *yaml.Node) {
			s, ok := p.str(v, what+".name", want)
			switch {
			case !ok:
			case !ruleNames.MatchString(s) || len(s) > MaxRuleName:
				p.errorf(v, "%s.name is %q; expected %s", what, clip(s), want)
			default:
				out.Name, name = s, v
			}
		}},
		{"action", true, func(v *yaml.Node) { out.Action = p.action(v, "action") }},
		peers,
		{"ports", false, func(v *yaml.Node) {
			p.list(v, "ports", "{protocol, port, endPort}", false, func(_ int, item *yaml.Node) {
				out.Ports = append(out.Ports, p.port(item))
			})
		}},
		{"icmp", false, func(v *yaml.Node) {
			p.list(v, "icmp", "{family, type, code}", false, func(_ int, item *yaml.Node) {
				out.ICMP = append(out.ICMP, p.icmp(item))
			})
		}},
	}
	if !ingress {
		fields = append(fields, p.byName(&out)...)
	}
	fields = append(fields, field{"limits", false, func(v *yaml.Node) { p.ruleLimits(v, &out.Limits) }})
	// Using the other direction's field is a likely mistake, and not a spelling one.
	if n.Kind == yaml.MappingNode {
		for i := 0; i < len(n.Content); i += 2 {
			if key := n.Content[i]; key.Kind == yaml.ScalarNode && key.Value == foreign {
				p.errorf(key, "%s has %s; expected %s (egress rules say to, ingress rules say from)", what, foreign, peers.name)
				fields = append(fields, field{foreign, false, func(*yaml.Node) {}})
				break
			}
		}
	}
	p.mapping(n, what, fields)
	if !ingress {
		p.checkByName(n, &out)
		if out.Action == Allow {
			p.unreachable(n, out.To)
		}
	}
	return out, name
}

// unreachable reports allow rules for addresses that no rule can open.
func (p *parser) unreachable(rule *yaml.Node, to []Peer) {
	for i, peer := range to {
		if !peer.CIDR.IsValid() {
			continue
		}
		// 127.0.0.0/8 and ::1 stand for the host's loopback where the gateway maps to it.
		if c := classOf(peer.CIDR); classes[c].lock == never && c != loopback {
			n := rule
			if list := value(rule, "to"); list != nil && i < len(list.Content) {
				n = list.Content[i]
			}
			p.errorf(n, "cidr %v can not be allowed: it is %s, which is always refused; expected another address, or action reject or drop",
				peer.CIDR, strings.TrimPrefix(classes[c].rule, "special:"))
		}
	}
}

// value finds the value of a key in a mapping.
func value(n *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

func (p *parser) peers(n *yaml.Node, what string) (out []Peer) {
	forms := "{cidr, except} or {entity}"
	if what == "to" {
		forms = "{domain}, {cidr, except} or {entity}"
	}
	p.list(n, what, forms, false, func(_ int, item *yaml.Node) {
		out = append(out, p.peer(item, what))
	})
	return out
}

func (p *parser) peer(n *yaml.Node, what string) (out Peer) {
	before := len(p.errs)
	var domain, cidr, except, entity *yaml.Node
	fields := []field{
		{"cidr", false, func(v *yaml.Node) { cidr, out.CIDR = v, p.cidr(v, "cidr") }},
		{"except", false, func(v *yaml.Node) {
			except = v
			p.list(v, "except", "CIDRs", true, func(_ int, item *yaml.Node) {
				out.Except = append(out.Except, p.cidr(item, "except"))
			})
		}},
		{"entity", false, func(v *yaml.Node) {
			entity = v
			words := make([]string, len(entities))
			for i, e := range entities {
				words[i] = string(e)
			}
			if i := p.word(v, "entity", words); i >= 0 {
				out.Entity = entities[i]
			}
		}},
	}
	if what == "to" {
		fields = append([]field{{"domain", false, func(v *yaml.Node) { domain, out.Domain = v, p.domain(v) }}}, fields...)
	}
	p.mapping(n, "a peer in "+what, fields)
	for i, e := range out.Except {
		if e.IsValid() && out.CIDR.IsValid() && (!prefix.Covers(out.CIDR, e) || e == out.CIDR) {
			p.errorf(except.Content[i], "except %v is not a part of cidr %v; expected a smaller range inside it", e, out.CIDR)
		}
	}
	switch {
	case domain != nil && (cidr != nil || entity != nil):
		p.errorf(domain, "a peer has domain and another; expected one of domain, cidr and entity (two peers match either)")
	case cidr != nil && entity != nil:
		p.errorf(entity, "a peer has cidr and entity; expected one of them (two peers match either)")
	case except != nil && cidr == nil:
		p.errorf(except, "except without cidr; expected a cidr that it is cut out of")
	case domain == nil && cidr == nil && entity == nil && len(p.errs) == before:
		p.errorf(n, "a peer in %s is empty; expected cidr or entity (leave %s out to match every address)", what, what)
	}
	return out
}

// cidr reads a network; it returns the zero Prefix on error.
func (p *parser) cidr(n *yaml.Node, what string) netip.Prefix {
	const want = "a network such as 10.0.0.0/8 or 2001:db8::/32"
	s, ok := p.str(n, what, want)
	if !ok {
		return netip.Prefix{}
	}
	pfx, err := netip.ParsePrefix(s)
	if err != nil {
		p.errorf(n, "%s is %q, which is not a CIDR; expected %s", what, clip(s), cidrMeant(s, want))
		return netip.Prefix{}
	}
	if pfx.Addr().Is4In6() {
		meant := "an IPv4 network"
		if pfx.Bits() >= 96 {
			meant = netip.PrefixFrom(pfx.Addr().Unmap(), pfx.Bits()-96).Masked().String()
		}
		p.errorf(n, "%s %s is IPv4 written as IPv6; expected %s", what, s, meant)
		return netip.Prefix{}
	}
	if m := pfx.Masked(); m != pfx {
		p.errorf(n, "%s %s has bits set after the prefix; expected %v for the network, or %v/%d for the one address",
			what, s, m, pfx.Addr(), pfx.Addr().BitLen())
		return netip.Prefix{}
	}
	return pfx
}

// cidrMeant guesses which CIDR an invalid string was meant to be.
func cidrMeant(s, want string) string {
	addr, bits, _ := strings.Cut(s, "/")
	a, err := netip.ParseAddr(addr)
	switch {
	case err != nil:
		return want
	case a.Zone() != "":
		return "an address without a zone (%" + clip(a.Zone()) + ")"
	case bits == "" && a.Is4In6():
		return a.Unmap().String() + "/32"
	case bits == "":
		return fmt.Sprintf("%v/%d for the one address", a, a.BitLen())
	default:
		return fmt.Sprintf("a prefix length from 0 to %d after the /", a.BitLen())
	}
}

func (p *parser) port(n *yaml.Node) (out Port) {
	words := make([]string, len(protocols))
	for i, k := range protocols {
		words[i] = k.name
	}
	var protocol, port, end *yaml.Node
	p.mapping(n, "a port", []field{
		{"protocol", false, func(v *yaml.Node) {
			protocol = v
			if i := p.word(v, "protocol", words); i >= 0 {
				out.Protocol = protocols[i].num
			}
		}},
		{"port", false, func(v *yaml.Node) { port, out.Port = v, uint16(p.number(v, "port", 1, 65535)) }},
		{"endPort", false, func(v *yaml.Node) { end, out.EndPort = v, uint16(p.number(v, "endPort", 1, 65535)) }},
	})
	if n.Kind != yaml.MappingNode {
		return out
	}
	switch {
	case protocol == nil:
		p.errorf(n, "a port lacks protocol; expected TCP, UDP or SCTP beside port, or a protocol alone")
	case out.Protocol != 0 && !out.Protocol.hasPorts() && (port != nil || end != nil):
		p.errorf(protocol, "%v has no ports; expected TCP, UDP or SCTP beside port (ICMP types go under icmp)", out.Protocol)
	case end != nil && port == nil:
		p.errorf(end, "endPort without port; expected port, the first of the range")
	case out.Port != 0 && out.EndPort != 0 && out.EndPort < out.Port:
		p.errorf(end, "endPort %d is below port %d; expected port %d and endPort %d", out.EndPort, out.Port, out.EndPort, out.Port)
	}
	return out
}

func (p *parser) icmp(n *yaml.Node) (out ICMP) {
	families := []string{string(IPv4), string(IPv6)}
	octet := func(dst **uint8, name string) func(*yaml.Node) {
		return func(v *yaml.Node) {
			b := uint8(p.number(v, "icmp "+name, 0, 255))
			*dst = &b
		}
	}
	p.mapping(n, "icmp", []field{
		{"family", true, func(v *yaml.Node) {
			if i := p.word(v, "icmp family", families); i >= 0 {
				out.Family = Family(families[i])
			}
		}},
		{"type", false, octet(&out.Type, "type")},
		{"code", false, octet(&out.Code, "code")},
	})
	if out.Code != nil && out.Type == nil {
		p.errorf(n, "icmp code without type; expected the type that the code belongs to")
	}
	return out
}
