package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"sluice.dev/sluice/policy"
)

// Compiled is what the policies of a cluster say about one pod.
type Compiled struct {
	// Policy is for the pod's worker. It must not be changed, because other pods may share its
	// rules.
	Policy *policy.Policy
	// Notes are about the policies that select the pod.
	Notes []Note
}

// PolicyName is the name of every compiled policy.
const PolicyName = "kubernetes"

// MaxPeers bounds the addresses and networks of a compiled policy, so that its text stays below
// policy.MaxPolicyBytes. A pod whose policies have more is closed to everything but its node.
const MaxPeers = policy.MaxPolicyBytes / maxPeerText

// maxPeerText is the maximum length in text of a peer, an exception, or a rule's name and ports.
const maxPeerText = 64

// Names of rules that come from no policy.
const (
	ruleNode      = "node"         // a pod's own node reaches it
	ruleIsolated  = "isolated"     // some NetworkPolicy selects the pod, and none allows this
	ruleUnpoliced = "not-selected" // no policy decides
	ruleUnopened  = "not-opened"   // it was passed to lower tiers, and no rule there opens the special address
	ruleClosed    = "closed"       // the policies cannot be compiled
)

// ofPod holds the rules that select one pod, tier by tier, each tier in the order of evaluation.
type ofPod struct {
	admin, namespaced, baseline []*rule
	isolated                    bool
}

// compile builds a pod's policy from the rules that select it.
func (w *world) compile(pod *Pod, rules [directions]ofPod, notes []Note) Compiled {
	out := &policy.Policy{APIVersion: policy.APIVersion, Kind: policy.Kind, Metadata: policy.Metadata{Name: PolicyName}}
	out.Spec = policy.Spec{DefaultAction: policy.Drop, Egress: []policy.Rule{}, Ingress: []policy.Rule{}, DNS: policy.DNS{Names: policy.NamesUngated}}
	peers := 0
	for d := range directions {
		e := emitter{direction: d, names: make(map[string]int)}
		if d == ingress {
			e.node(w, pod)
		}
		for _, r := range w.order(pod, d, &rules[d]) {
			e.emit(r)
		}
		peers += e.peers
		if d == ingress {
			out.Spec.Ingress = e.rules
		} else {
			out.Spec.Egress = e.rules
			out.Spec.DNS.Names = namesMode(e.rules)
		}
	}
	if peers > MaxPeers {
		notes = append(slices.Clone(notes), Note{"pod " + pod.Key.String(), fmt.Sprintf("its policies have %d addresses and networks, more than %d: it is closed", peers, MaxPeers)})
		return w.closed(pod, notes)
	}
	return Compiled{out, notes}
}

// namesMode returns which names a pod may ask for. Rules by domain need the gate of names, which
// then answers every question. Without such rules, questions pass as ordinary packets. With them, a
// pod may ask for any name if it may send questions anywhere, and otherwise for the names of its
// rules.
func namesMode(rules []policy.Rule) policy.NamesMode {
	byDomain, asks, stopped := false, false, false
	for i := range rules {
		r := &rules[i]
		byDomain = byDomain || slices.ContainsFunc(r.To, func(p policy.Peer) bool { return p.Domain != "" })
		dns := len(r.Ports) == 0 || slices.ContainsFunc(r.Ports, func(p policy.Port) bool {
			lo, hi := portRange(p)
			return p.Protocol != policy.SCTP && lo <= dnsPort && dnsPort <= hi
		})
		addresses := len(r.To) == 0 || slices.ContainsFunc(r.To, func(p policy.Peer) bool { return p.Domain == "" })
		asks = asks || !stopped && dns && addresses && r.Action == policy.Allow
		stopped = stopped || len(r.To) == 0 && len(r.Ports) == 0 && r.Action != policy.Allow
	}
	switch {
	case !byDomain:
		return policy.NamesUngated
	case asks:
		return policy.NamesAny
	}
	return policy.NamesByRules
}

const dnsPort = 53

// closed returns the policy of a pod that only its node may reach.
func (w *world) closed(pod *Pod, notes []Note) Compiled {
	out := &policy.Policy{APIVersion: policy.APIVersion, Kind: policy.Kind, Metadata: policy.Metadata{Name: PolicyName}}
	e := emitter{direction: ingress, names: make(map[string]int)}
	e.node(w, pod)
	refuse := policy.Rule{Name: ruleClosed, Action: policy.Drop}
	out.Spec = policy.Spec{DefaultAction: policy.Drop, Ingress: append(e.rules, refuse), Egress: []policy.Rule{refuse}, DNS: policy.DNS{Names: policy.NamesUngated}}
	return Compiled{out, notes}
}

// found is a rule with its addresses.
type found struct {
	name    string
	action  action
	clauses []clause
}

// order returns the rules of one direction in an order in which the first match decides.
func (w *world) order(pod *Pod, d direction, rules *ofPod) []found {
	var below []found
	for _, r := range rules.namespaced {
		below = append(below, w.find(r, pod, d))
	}
	all := []clause{{any: true}}
	if rules.isolated {
		below = append(below, found{ruleIsolated, deny, all})
	} else {
		below = append(below, w.tier(rules.baseline, pod, d, []found{{ruleUnpoliced, accept, all}})...)
	}
	return w.tier(rules.admin, pod, d, below)
}

func (w *world) find(r *rule, pod *Pod, d direction) found {
	return found{r.name, r.action, w.clauses(r, pod, d)}
}

// tier puts the rules of a tier above those of the lower tiers. Package policy has no tiers: where
// a rule passes traffic on, the lower tiers' rules for that traffic take its place.
func (w *world) tier(rules []*rule, pod *Pod, d direction, below []found) (out []found) {
	for i := 0; i < len(rules); i++ {
		f := w.find(rules[i], pod, d)
		if f.action != pass {
			out = append(out, f)
			continue
		}
		for ; i+1 < len(rules) && rules[i+1].action == pass; i++ {
			f.clauses = append(f.clauses, w.clauses(rules[i+1], pod, d)...)
		}
		if slices.ContainsFunc(f.clauses, func(c clause) bool { return c.any && c.ports == nil }) {
			break // nothing reaches the rules that follow
		}
		for _, b := range below {
			out = append(out, b.within(f.clauses, d, w.hostOf(pod)))
		}
		// Traffic that the lower tiers would open if it were not special must not reach the rules
		// that follow.
		out = append(out, found{ruleUnopened, deny, f.clauses})
	}
	return append(out, below...)
}

// within returns the rule cut to the traffic that any of the clauses matches.
func (f found) within(clauses []clause, d direction, host []netip.Prefix) found {
	out := found{name: f.name, action: f.action}
	for i := range f.clauses {
		for j := range clauses {
			if c, ok := f.clauses[i].within(&clauses[j], d == egress && f.action == accept, host); ok {
				out.clauses = append(out.clauses, c)
			}
		}
	}
	return out
}

// emitter writes the rules of one direction.
type emitter struct {
	direction direction
	rules     []policy.Rule
	names     map[string]int // how often each was used
	peers     int
}

// node lets a pod's own node in whatever the policies say, because probes come from there.
func (e *emitter) node(w *world, pod *Pod) {
	r := policy.Rule{Name: ruleNode, Action: policy.Allow, From: []policy.Peer{{Entity: policy.EntityHost}}}
	for _, p := range w.hostOf(pod) {
		r.From = append(r.From, policy.Peer{CIDR: p})
	}
	e.rules = []policy.Rule{r}
	e.peers += len(r.From)
}

// anywhere holds every destination that an allow rule without peers opens. Its special addresses
// are those of specials and the node's (doc.go).
var anywhere = []policy.Peer{{Entity: policy.EntityWorld}, {Entity: policy.EntityLinkLocal}, {Entity: policy.EntityReserved}, {Entity: policy.EntityHost}}

func (e *emitter) emit(f found) {
	for i := range f.clauses {
		c := &f.clauses[i]
		if c.empty() {
			continue
		}
		r := policy.Rule{Name: e.name(f.name), Action: policy.Drop, Ports: c.ports}
		if f.action == accept {
			r.Action = policy.Allow
		}
		var peers []policy.Peer
		switch {
		case c.any:
			if e.direction == egress && f.action == accept {
				peers = anywhere
			}
		case c.pods != nil:
			peers = c.pods.peers
		default:
			for _, b := range c.blocks {
				peers = append(peers, b.peer())
				e.peers += len(b.except)
			}
			for _, d := range c.domains {
				peers = append(peers, policy.Peer{Domain: d})
			}
		}
		e.peers += len(peers) + len(c.ports) + 4
		if e.direction == ingress {
			r.From = peers
		} else {
			r.To = peers
		}
		e.rules = append(e.rules, r)
	}
}

// name makes a rule's name unique: the first rule keeps the name, later ones add a number.
func (e *emitter) name(base string) string {
	n := e.names[base]
	e.names[base]++
	if n == 0 {
		return base
	}
	return base + "." + strconv.Itoa(n)
}

// same reports whether two compilations of one pod are equal. It compares what emitter writes, and
// skips addresses that both share.
func (c *Compiled) same(d *Compiled) bool {
	p, q := &c.Policy.Spec, &d.Policy.Spec
	return p.DNS.Names == q.DNS.Names && slices.Equal(c.Notes, d.Notes) &&
		slices.EqualFunc(p.Ingress, q.Ingress, sameRule) && slices.EqualFunc(p.Egress, q.Egress, sameRule)
}

func sameRule(r, s policy.Rule) bool {
	return r.Name == s.Name && r.Action == s.Action && slices.Equal(r.Ports, s.Ports) && samePeers(r.From, s.From) && samePeers(r.To, s.To)
}

func samePeers(a, b []policy.Peer) bool {
	if len(a) == len(b) && len(a) > 0 && &a[0] == &b[0] {
		return true
	}
	return slices.EqualFunc(a, b, func(x, y policy.Peer) bool {
		return x.CIDR == y.CIDR && x.Entity == y.Entity && x.Domain == y.Domain && slices.Equal(x.Except, y.Except)
	})
}

// Document returns the policy in the form that a worker's control socket takes.
func (c Compiled) Document() (policy.Document, error) {
	text, err := json.Marshal(c.Policy)
	if err != nil {
		return policy.Document{}, fmt.Errorf("write down the policy of a pod: %w", err)
	}
	return policy.NewDocument(c.Policy.Metadata.Name, text)
}
