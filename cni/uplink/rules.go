package uplink

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The rules of the uplink namespace, as `nft list ruleset` would have them:
//
//	table inet sluice {
//	  set pod4 { type ipv4_addr; elements = { … } }
//	  set pod6 { type ipv6_addr; elements = { … } }
//	  chain steer { type filter hook prerouting priority mangle
//	    iifname != MAIN accept
//	    meta nfproto ipv4 ip daddr != @pod4 accept
//	    meta nfproto ipv6 ip6 daddr != @pod6 accept
//	    socket transparent <any> accept
//	    meta l4proto icmp jump icmp4
//	    meta l4proto icmpv6 jump icmp6
//	    meta mark set MARK
//	    ip ttl 1 ip ttl set 2
//	    ip6 hoplimit 1 ip6 hoplimit set 2
//	  }
//	  chain icmp4, icmp6 { what the kernel and the worker's ping sockets need: accept }
//	  chain defragment { never matches, but makes the kernel reassemble: below }
//	}

const TableName = "sluice"

// neverPort is a port for a rule that never matches.
const neverPort = 1

// ruleset collects one transaction.
type ruleset struct {
	conn  *nftables.Conn
	table *nftables.Table
}

// steerRules loads the rules into the calling thread's namespace, in one transaction.
func steerRules(main string, addrs []netip.Prefix) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	r := &ruleset{conn: conn}
	// An existing table is replaced. The first line keeps the second from failing.
	r.table = conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: TableName})
	conn.DelTable(r.table)
	conn.AddTable(r.table)
	if err := r.load(main, addrs); err != nil {
		return err
	}
	return conn.Flush()
}

// HaveRules reports whether the table exists in the calling thread's namespace.
func HaveRules() (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, err
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list the nftables tables: %w", err)
	}
	for _, t := range tables {
		if t.Name == TableName {
			return true, nil
		}
	}
	return false, nil
}

func (r *ruleset) load(main string, addrs []netip.Prefix) error {
	var pod4, pod6 []nftables.SetElement
	for _, p := range addrs {
		e := nftables.SetElement{Key: p.Addr().AsSlice()}
		if p.Addr().Is4() {
			pod4 = append(pod4, e)
		} else {
			pod6 = append(pod6, e)
		}
	}
	set4 := &nftables.Set{Table: r.table, Name: "pod4", KeyType: nftables.TypeIPAddr}
	set6 := &nftables.Set{Table: r.table, Name: "pod6", KeyType: nftables.TypeIP6Addr}
	for _, s := range []struct {
		set      *nftables.Set
		elements []nftables.SetElement
	}{{set4, pod4}, {set6, pod6}} {
		if err := r.conn.AddSet(s.set, s.elements); err != nil {
			return err
		}
	}

	prerouting := r.base("steer", nftables.ChainHookPrerouting, *nftables.ChainPriorityMangle)
	icmp4, icmp6 := r.chain("icmp4"), r.chain("icmp6")

	r.rule(prerouting, iifname(expr.CmpOpNeq, main), accept())
	r.rule(prerouting, family(unix.NFPROTO_IPV4), notIn(set4, 16, 4), accept())
	r.rule(prerouting, family(unix.NFPROTO_IPV6), notIn(set6, 24, 16), accept())
	r.rule(prerouting, anySocket(), accept())
	r.rule(prerouting, l4proto(unix.IPPROTO_ICMP), jump(icmp4))
	r.rule(prerouting, l4proto(unix.IPPROTO_ICMPV6), jump(icmp6))
	r.rule(prerouting, setMark(steerMark))
	// Forwarding to in0 must not drop a packet whose hop limit allows it no further than here.
	r.rule(prerouting, family(unix.NFPROTO_IPV4), hopIs(ttlOffset, 1), immediate([]byte{2}), writeTTL())
	r.rule(prerouting, family(unix.NFPROTO_IPV6), hopIs(hopLimitOffset, 1), immediate([]byte{2}), writeHopLimit())
	r.icmp(icmp4, icmpKinds{reply: []byte{0}, errors: []byte{3, 11, 12}, request: 8, proto: unix.IPPROTO_ICMP, innerProto: 9, innerLen: 20})
	r.icmp(icmp6, icmpKinds{reply: []byte{129, 133, 134, 135, 136, 137}, errors: []byte{1, 2, 3, 4}, request: 128, proto: unix.IPPROTO_ICMPV6, innerProto: 6, innerLen: 40})

	r.defragment()
	return nil
}

type icmpKinds struct {
	reply, errors        []byte // types
	request              byte
	proto                byte
	innerProto, innerLen uint32 // offset of the protocol in, and length of, the packet header inside an error
}

// icmp accepts messages for this namespace's kernel and for the worker's ping sockets, which
// `socket` does not match. The pod itself sends no echo requests, so every reply, and every error
// about a request, is for a ping socket.
func (r *ruleset) icmp(c *nftables.Chain, k icmpKinds) {
	const header = 8 // of ICMP, before the packet that an error is about
	for _, t := range k.reply {
		r.rule(c, transportByte(0, t), accept())
	}
	for _, t := range k.errors {
		r.rule(c, transportByte(0, t), transportByte(header+k.innerProto, k.proto), transportByte(header+k.innerLen, k.request), accept())
	}
}

// defragment makes the kernel reassemble before our rules look for sockets: only the first fragment
// has the ports. The presence of a tproxy rule switches reassembly on; connection tracking would
// too, but costs something per flow.
func (r *ruleset) defragment() {
	c := r.base("defragment", nftables.ChainHookPrerouting, *nftables.ChainPriorityMangle+1)
	r.rule(c,
		iifname(expr.CmpOpEq, ""), l4proto(unix.IPPROTO_UDP),
		[]expr.Any{
			&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(neverPort)},
			&expr.TProxy{Family: unix.NFPROTO_UNSPEC, TableFamily: unix.NFPROTO_INET, RegPort: 1},
		})
}

func (r *ruleset) base(name string, hook *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{
		Table: r.table, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: &priority,
	})
}

func (r *ruleset) chain(name string) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Table: r.table, Name: name})
}

func (r *ruleset) rule(c *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: c, Exprs: all})
}

// The expressions. Each uses register 1 and leaves no value in it for the next.

const (
	ttlOffset      = 8
	checksumOffset = 10
	hopLimitOffset = 7
)

func load(key expr.MetaKey, op expr.CmpOp, data []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: data}}
}

func iifname(op expr.CmpOp, name string) []expr.Any {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return load(expr.MetaKeyIIFNAME, op, padded)
}

func family(f byte) []expr.Any { return load(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{f}) }

func l4proto(p byte) []expr.Any { return load(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{p}) }

func setMark(m uint32) []expr.Any {
	return append(immediate(binaryutil.NativeEndian.PutUint32(m)),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1})
}

func immediate(data []byte) []expr.Any { return []expr.Any{&expr.Immediate{Register: 1, Data: data}} }

func notIn(set *nftables.Set, offset, length uint32) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID, Invert: true},
	}
}

// anySocket matches a packet for which there is a socket of any kind here: without one the
// expression ends the rule.
func anySocket() []expr.Any {
	return []expr.Any{
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1},
		&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: []byte{1}},
	}
}

func transportByte(offset uint32, value byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{value}},
	}
}

func hopIs(offset uint32, value byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{value}},
	}
}

func writeTTL() []expr.Any {
	return []expr.Any{&expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseNetworkHeader,
		Offset: ttlOffset, Len: 1, CsumType: expr.CsumTypeInet, CsumOffset: checksumOffset,
	}}
}

func writeHopLimit() []expr.Any {
	return []expr.Any{&expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseNetworkHeader,
		Offset: hopLimitOffset, Len: 1,
	}}
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

func jump(c *nftables.Chain) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: c.Name}}
}
