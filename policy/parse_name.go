package policy

import (
	"slices"
	"strconv"
	"time"

	"go.yaml.in/yaml/v3"
)

// oneOf reads one word of a set; it returns the empty string on error.
func oneOf[T ~string](p *parser, n *yaml.Node, what string, known []T) T {
	words := make([]string, len(known))
	for i, k := range known {
		words[i] = string(k)
	}
	if i := p.word(n, what, words); i >= 0 {
		return known[i]
	}
	return ""
}

// domain reads a domain pattern in its normal form; it returns the empty string on error.
func (p *parser) domain(n *yaml.Node) string {
	const want = "a name such as example.com, *.example.com (one label) or **.example.com (one or more)"
	s, ok := p.str(n, "domain", want)
	if !ok {
		return ""
	}
	norm, err := NormalizePattern(s)
	if err != nil {
		p.errorf(n, "domain is %q: %v; expected %s", clip(s), err, want)
	}
	return norm
}

// byName returns the fields of an egress rule that concern names and requests.
func (p *parser) byName(out *Rule) []field {
	setting := func(name string, dst *Setting) field {
		return field{name, false, func(v *yaml.Node) { *dst = oneOf(p, v, name, settings) }}
	}
	return []field{
		{"verify", false, func(v *yaml.Node) { out.Verify = oneOf(p, v, "verify", verifyRules) }},
		setting("missingName", &out.MissingName),
		setting("ech", &out.ECH),
		setting("quic", &out.QUIC),
		setting("privateAddresses", &out.PrivateAddresses),
		{"http", false, func(v *yaml.Node) {
			p.list(v, "http", "{methods, path}", false, func(_ int, item *yaml.Node) {
				out.HTTP = append(out.HTTP, p.http(item))
			})
		}},
	}
}

// checkByName reports fields that make no sense together.
func (p *parser) checkByName(n *yaml.Node, r *Rule) {
	if len(p.errs) == 0 {
		if err := r.checkByName(false); err != nil {
			p.errorf(n, "%v", err)
		}
	}
}

func (p *parser) http(n *yaml.Node) (out HTTPMatch) {
	p.mapping(n, "http", []field{
		{"methods", false, func(v *yaml.Node) {
			p.list(v, "methods", "methods", false, func(_ int, item *yaml.Node) {
				if s, ok := p.str(item, "a method", "a method such as GET"); ok {
					if err := (HTTPMatch{Methods: []string{s}}).check(); err != nil {
						p.errorf(item, "%v; expected a method such as GET", err)
					}
					out.Methods = append(out.Methods, s)
				}
			})
		}},
		{"path", false, func(v *yaml.Node) {
			const want = "a path such as /simple/requests/, or a prefix such as /simple/*"
			if s, ok := p.str(v, "path", want); ok {
				if err := (HTTPMatch{Path: s}).check(); err != nil || s == "" {
					p.errorf(v, "path is %q; expected %s, without segments such as .. that servers resolve", clip(s), want)
				}
				out.Path = s
			}
		}},
	})
	return out
}

func (p *parser) dns(n *yaml.Node, out *DNS) {
	duration := func(name string, dst *Duration) field {
		return field{name, false, func(v *yaml.Node) {
			d, err := time.ParseDuration(p.quantity(v))
			if err != nil || d < time.Second || d > MaxTTL || d%time.Second != 0 {
				p.errorf(v, "%s is %s; expected whole seconds, minutes or hours such as 60s, from 1s to %v", name, describe(v), Duration(MaxTTL))
				return
			}
			*dst = Duration(d)
		}}
	}
	upTo := func(name string, dst *int, most int) field {
		return field{name, false, func(v *yaml.Node) { *dst = p.number(v, name, 1, most) }}
	}
	p.mapping(n, "dns", []field{
		{"names", false, func(v *yaml.Node) { out.Names = oneOf(p, v, "names", namesModes) }},
		{"refusal", false, func(v *yaml.Node) { out.Refusal = oneOf(p, v, "refusal", refusals) }},
		{"types", false, func(v *yaml.Node) {
			words := make([]string, len(queryTypes))
			for i, t := range queryTypes {
				words[i] = t.name
			}
			p.list(v, "types", "query types", false, func(_ int, item *yaml.Node) {
				if i := p.word(item, "a query type", words); i >= 0 && !slices.Contains(out.Types, words[i]) {
					out.Types = append(out.Types, words[i])
				}
			})
		}},
		duration("ttlFloor", &out.TTLFloor),
		duration("ttlCap", &out.TTLCap),
		upTo("maxLabelLength", &out.MaxLabelLength, mostLabelLength),
		upTo("maxWildcardLength", &out.MaxWildcardLength, mostWildcardLength),
		{"maxWildcardEntropy", false, func(v *yaml.Node) {
			bits, err := strconv.ParseFloat(p.quantity(v), 64)
			if err != nil || !(bits >= 0.1 && bits <= mostWildcardEntropy) {
				p.errorf(v, "maxWildcardEntropy is %s; expected bits in a byte such as 4.5, from 0.1 to %d", describe(v), mostWildcardEntropy)
				return
			}
			out.MaxWildcardEntropy = bits
		}},
		upTo("maxNamesPerMinute", &out.MaxNamesPerMinute, mostNamesPerMinute),
	})
	if out.TTLCap != 0 && out.TTLFloor > out.TTLCap {
		p.errorf(n, "ttlFloor %v is above ttlCap %v; expected it at or below", out.TTLFloor, out.TTLCap)
	}
}

func (p *parser) count(name string, dst *int) field {
	return field{name, false, func(v *yaml.Node) { *dst = p.number(v, name, 1, 1<<31-1) }}
}

func (p *parser) rate(name string, dst *Bandwidth) field {
	return field{name, false, func(v *yaml.Node) {
		var err error
		if *dst, err = parseBandwidth(p.quantity(v)); err != nil {
			p.errorf(v, "%s: %v", name, err)
		}
	}}
}

func (p *parser) amount(name string, dst *Bytes) field {
	return field{name, false, func(v *yaml.Node) {
		var err error
		if *dst, err = parseBytes(p.quantity(v)); err != nil {
			p.errorf(v, "%s: %v", name, err)
		}
	}}
}

func (p *parser) limits(n *yaml.Node, out *Limits) {
	p.mapping(n, "limits", []field{
		p.count("flows", &out.Flows),
		p.count("halfOpen", &out.HalfOpen),
		p.count("newFlowsPerSecond", &out.NewFlowsPerSecond),
		p.rate("egressBandwidth", &out.EgressBandwidth),
		p.rate("ingressBandwidth", &out.IngressBandwidth),
		p.amount("totalBytes", &out.TotalBytes),
		p.count("flowsPerDestination", &out.FlowsPerDestination),
		p.count("dnsQueriesPerSecond", &out.DNSQueriesPerSecond),
	})
}

func (p *parser) ruleLimits(n *yaml.Node, out *RuleLimits) {
	p.mapping(n, "limits", []field{
		p.count("flows", &out.Flows),
		p.count("newFlowsPerSecond", &out.NewFlowsPerSecond),
		p.rate("egressBandwidth", &out.EgressBandwidth),
		p.rate("ingressBandwidth", &out.IngressBandwidth),
		p.amount("totalBytes", &out.TotalBytes),
	})
}
