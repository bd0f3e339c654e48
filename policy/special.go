package policy

import (
	"net/netip"
)

// The audited table of special addresses. Everything the package knows about an address beyond a
// policy's rules is in this file: which addresses are special, what unlocks them, and which carry
// another address.
//
// As a destination (egress):
//
//	class          range                           source             unlocked by
//	this-network   0.0.0.0/8, ::/128               RFC 1122, 4291     never
//	loopback       127.0.0.0/8, ::1/128            RFC 1122, 4291     never as such; see host-loopback
//	link-local     169.254.0.0/16, fe80::/10       RFC 3927, 4291     entity link-local, CIDR inside
//	metadata       the addresses below             clouds' manuals    entity metadata, CIDR of the one address
//	multicast      224.0.0.0/4, ff00::/8           RFC 5771, 4291     entity multicast, CIDR inside
//	reserved       240.0.0.0/4                     RFC 1112           entity reserved, CIDR inside
//	broadcast      255.255.255.255/32              RFC 919            never
//	v4-compat      ::/96                           RFC 4291 2.5.5.1   never
//	v4-mapped      ::ffff:0:0/96                   RFC 4291 2.5.5.2   is the IPv4 address (unmapped on entry)
//	v4-translated  ::ffff:0:0:0/96                 RFC 2765           ordinary, and what it embeds
//	nat64          64:ff9b::/96                    RFC 6052           ordinary, and what it embeds
//	nat64-local    64:ff9b:1::/48                  RFC 8215           CIDR inside, and what it embeds as a /96
//	6to4           2002::/16                       RFC 3056           ordinary, and what it embeds
//	teredo         2001::/32                       RFC 4380           ordinary, and what it embeds (server, client)
//	unique-local   fc00::/7                        RFC 4193           ordinary; and a metadata service that it spells
//	                                                                  in its last 32 bits, as link-local
//	(ISATAP)       ::0:5efe:0:0, ::200:5efe:0:0    RFC 5214           by interface identifier, in every range: what
//	                                                                  the range says, and what it embeds
//	host           Environment.Host                –                  entity host, CIDR inside (for one address: of it)
//	metadata       Environment.Metadata            –                  entity metadata, CIDR inside (as above)
//	(own NAT64)    Environment.NAT64               RFC 6052, 7050     in every range: what the range says, and what it embeds
//	gateway        Environment.Gateway4/6          –                  never
//	host-loopback  the gateway, if it stands for   –                  entity host-loopback, CIDR inside loopback,
//	               the host's loopback                                CIDR of the gateway
//	dns            Environment.DNS4/6              –                  never (its port 53 is served, not dialled)
//	guest          Environment.Guest               –                  never
//	zone           any address with a zone         RFC 4007           never
//
// "and what it embeds" means that the address must be allowed as it stands and the embedded IPv4
// address must be allowed for the same protocol and port. Where ranges nest, the innermost one
// counts: metadata is not unlocked by what unlocks link-local. A host address inside another
// special range stays in that range: the stricter reading wins.
//
// As a client (ingress), this-network, multicast, broadcast and v4-compat are refused: no client
// can have such an address. A metadata service is not a client either, unless a rule names it,
// because the sandbox's answers to it would open it. The other classes only define the entities;
// but no client's address may embed one that is never unlocked, or a metadata service.
type class uint8

const (
	ordinary class = iota
	thisNetwork
	loopback
	linkLocal
	metadata
	multicast
	reserved
	broadcast
	v4Compat
	v4Translated
	nat64
	nat64Local
	sixToFour
	teredo
	uniqueLocal
	host
	gateway
	hostLoopback
	dnsServer
	guest
	numClasses
)

// lock is what opens a class to an allow rule in egress.
type lock uint8

const (
	never lock = iota // nothing does
	named             // only a rule that names it
	open              // any rule
)

type classInfo struct {
	rule    string // the name under which a verdict refuses it
	lock    lock
	martian bool // never a client's address
	// namedClient: it needs a rule that names it as a client, too.
	namedClient bool
	entity      Entity
	ranges      []netip.Prefix                      // nil if they come with the Environment
	embeds      func(b [16]byte) (v4 [2]netip.Addr) // nil if it embeds nothing
}

// closed reports whether, in one direction, only a rule that names an address of the class admits
// it.
func (i *classInfo) closed(ingress bool) bool {
	return i.lock != open && (!ingress || i.namedClient)
}

var classes = [numClasses]classInfo{
	ordinary:     {lock: open},
	thisNetwork:  {rule: "special:this-network", martian: true, ranges: prefixes("0.0.0.0/8", "::/128")},
	loopback:     {rule: "special:loopback", ranges: prefixes("127.0.0.0/8", "::1/128")},
	linkLocal:    {rule: "special:link-local", lock: named, entity: EntityLinkLocal, ranges: prefixes("169.254.0.0/16", "fe80::/10"), embeds: metadataInLast32},
	metadata:     {rule: "special:metadata", lock: named, namedClient: true, entity: EntityMetadata, ranges: metadataServices},
	multicast:    {rule: "special:multicast", lock: named, martian: true, entity: EntityMulticast, ranges: prefixes("224.0.0.0/4", "ff00::/8")},
	reserved:     {rule: "special:reserved", lock: named, entity: EntityReserved, ranges: prefixes("240.0.0.0/4")},
	broadcast:    {rule: "special:broadcast", martian: true, ranges: prefixes("255.255.255.255/32")},
	v4Compat:     {rule: "special:v4-compat", martian: true, ranges: prefixes("::/96")},
	v4Translated: {rule: "special:v4-translated", lock: open, ranges: prefixes("::ffff:0:0:0/96"), embeds: inLast32},
	nat64:        {rule: "special:nat64", lock: open, ranges: prefixes("64:ff9b::/96"), embeds: inLast32},
	nat64Local:   {rule: "special:nat64-local", lock: named, ranges: prefixes("64:ff9b:1::/48"), embeds: inLast32},
	sixToFour:    {rule: "special:6to4", lock: open, ranges: prefixes("2002::/16"), embeds: in6to4},
	teredo:       {rule: "special:teredo", lock: open, ranges: prefixes("2001::/32"), embeds: inTeredo},
	uniqueLocal:  {rule: "special:unique-local", lock: open, ranges: prefixes("fc00::/7"), embeds: metadataInLast32},
	host:         {rule: "special:host", lock: named, entity: EntityHost},
	gateway:      {rule: "special:gateway"},
	hostLoopback: {rule: "special:host-loopback", lock: named, entity: EntityHostLoopback},
	dnsServer:    {rule: "special:dns"},
	guest:        {rule: "special:guest"},
}

// Refusals that precede any address class.
const (
	ruleNoPolicy = "no-policy"       // no rules are in force
	ruleInvalid  = "special:invalid" // not an address
	ruleZone     = "special:zone"
	rulePortZero = "special:port-zero" // RFC 6335 section 6: reserved
	ruleDefault  = "default"
)

// metadataServices hand out credentials to any client.
var metadataServices = prefixes(
	"169.254.169.254/32", "fd00:ec2::254/128", // AWS; the first also GCP, Azure, OpenStack and most others
	"169.254.170.2/32",                      // AWS ECS task credentials
	"169.254.170.23/32", "fd00:ec2::23/128", // AWS EKS pod identity
	"fd00:a9fe:a9fe::1/128", "fe80::a9fe:a9fe/128", // Akamai (Linode); the second also OpenStack
	"fd00:c1::a9fe:a9fe/128",              // Oracle Cloud
	"100.96.0.96/32",                      // Volcengine
	"100.80.80.80/32",                     // UCloud
	"fd00:100::100:200/128",               // Alibaba Cloud by IPv6
	"fd20:ce::254/128",                    // GCP
	"168.63.129.16/32",                    // Azure wire server
	"100.100.100.200/32",                  // Alibaba Cloud
	"192.0.0.192/32",                      // Oracle Cloud classic
	"169.254.42.42/32", "fd00:42::42/128", // Scaleway
)

// privateRanges are entity private: ordinary addresses, not special ones. 198.18.0.0/15 (RFC 2544)
// and fec0::/10 (RFC 3879) belong to no public network either.
var privateRanges = prefixes("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15", "fc00::/7", "fec0::/10")

var (
	everyIPv4     = netip.MustParsePrefix("0.0.0.0/0")
	everyIPv6     = netip.MustParsePrefix("::/0")
	hostLoopback4 = netip.MustParseAddr("127.0.0.1")
	hostLoopback6 = netip.IPv6Loopback()
)

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}

func inLast32(b [16]byte) [2]netip.Addr {
	return [2]netip.Addr{netip.AddrFrom4([4]byte(b[12:16]))}
}

// metadataInLast32 finds the IPv4 address of a metadata service at the end of a local address,
// which is how clouds write the IPv6 address of the same service: fd00:c1::a9fe:a9fe,
// fe80::a9fe:a9fe.
func metadataInLast32(b [16]byte) (none [2]netip.Addr) {
	a := netip.AddrFrom4([4]byte(b[12:16]))
	for _, p := range metadataServices {
		if p.Contains(a) {
			return [2]netip.Addr{a}
		}
	}
	return none
}

func in6to4(b [16]byte) [2]netip.Addr {
	return [2]netip.Addr{netip.AddrFrom4([4]byte(b[2:6]))}
}

// inTeredo follows RFC 4380 section 4: the server's address as is, the client's inverted.
func inTeredo(b [16]byte) [2]netip.Addr {
	return [2]netip.Addr{
		netip.AddrFrom4([4]byte(b[4:8])),
		netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}),
	}
}

// members returns the addresses of an entity other than world, among the special ranges of one
// direction.
func members(e Entity, special map[netip.Prefix]class, ingress bool) []netip.Prefix {
	if e == EntityPrivate {
		return privateRanges
	}
	if e == EntityHostLoopback && ingress {
		return classes[loopback].ranges
	}
	var out []netip.Prefix
	for p, c := range special {
		if classes[c].entity == e {
			out = append(out, p)
		}
	}
	return out
}
