package e2e

// What root in a sandbox can put on its link, packet by packet.

import "net/netip"

const (
	guest4, guest6     = "10.0.2.100", "fd73:6c75:6963:65::100"
	gateway4, gateway6 = "10.0.2.2", "fd73:6c75:6963:65::2"
	dns4, dns6         = "10.0.2.3", "fd73:6c75:6963:65::3"
	late4, late6       = "192.0.2.77", "2001:db8:1::77"    // addresses that the host gets later
	scene4, scene6     = "198.51.100.12", "2001:db8:2::12" // far's, for scenes
	second4, second6   = "198.51.100.13", "2001:db8:2::13" // far's, with a name of its own
)

// pick returns one of two values by family.
func pick[T any](v6 bool, four, six T) T {
	if v6 {
		return six
	}
	return four
}

// syn returns a connection request to an address.
func syn(four, six string, port int) func(bool) []ipPacket {
	return func(v6 bool) []ipPacket {
		to := pick(v6, four, six)
		if to == "" {
			return nil
		}
		return []ipPacket{ipPacket{dst: to}.tcp(40000, port, tcpSYN, "")}
	}
}

func one(make func(v6 bool) ipPacket) func(bool) []ipPacket {
	return func(v6 bool) []ipPacket { return []ipPacket{make(v6)} }
}

// other returns a packet of another IP protocol to the granted server.
func other(proto int, payload ...byte) func(bool) []ipPacket {
	return one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, far4, far6), proto: proto, payload: append(payload, "LEAK-LEAK-LEAK-LEAK"...)}
	})
}

// overlap rewrites the port of a seemingly permitted packet with a second, overlapping fragment.
func overlap(v6 bool) []ipPacket {
	whole := ipPacket{dst: pick(v6, far4, far6)}.udp(40001, 8080, "0123456789012345")
	evil := ipPacket{dst: pick(v6, far4, far6)}.udp(40001, portWhoami, "0123456789012345")
	first, last := whole.cut(16)
	over := evil
	over.fragment, over.frag, over.payload = true, moreFragments, evil.payload[:16]
	return []ipPacket{first, over, last}
}

// tinyFirst leaves the place of the ports to the second fragment.
func tinyFirst(v6 bool) []ipPacket {
	whole := ipPacket{dst: pick(v6, other4, other6)}.tcp(40002, portWhoami, tcpSYN, "")
	first, second := whole.cut(8)
	first.payload = first.payload[:0]
	second.frag, second.payload = 0, whole.payload
	second.frag |= moreFragments
	return []ipPacket{first, second}
}

// chain puts IPv6 extension headers before a segment to a closed address.
func chain(n int) func(bool) []ipPacket {
	return func(v6 bool) []ipPacket {
		if !v6 {
			return nil
		}
		p := ipPacket{dst: other6}.tcp(40020+n, portWhoami, tcpSYN, "")
		for i := range n {
			next := byte(60)
			if i == n-1 {
				next = protoTCP
			}
			p.exts = append(p.exts, next, 0, 1, 4, 0, 0, 0, 0)
		}
		p.ext = 60
		return []ipPacket{p}
	}
}

// headers puts IPv6 extension headers, each with its type, before a segment.
func headers(v6 bool, p ipPacket, exts ...[]byte) []ipPacket {
	if !v6 {
		return nil
	}
	p.ext = int(exts[0][0])
	for i, e := range exts {
		next := byte(p.proto)
		if i+1 < len(exts) {
			next = exts[i+1][0]
		}
		p.exts = append(append(p.exts, next), e[1:]...)
	}
	return []ipPacket{p}
}

// routing returns a routing header of a type, to a closed address.
func routing(kind, left byte) []byte {
	return append([]byte{43, 2, kind, left, 0, 0, 0, 0}, netip.MustParseAddr(other6).AsSlice()...)
}

// padded returns an options header that holds only padding.
func padded(kind byte) []byte { return []byte{kind, 0, 1, 4, 0, 0, 0, 0} }

func webSYN(sport int) ipPacket { return ipPacket{dst: far6}.tcp(sport, 8080, tcpSYN, "") }

// icmp returns a message with a payload to the granted server.
func icmp(four, six byte) func(bool) []ipPacket {
	return one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, far4, far6)}.icmp(pick(v6, four, six), "LEAK-LEAK-LEAK-LEAK-LEAK-LEAK-LEAK-LEAK")
	})
}

// strictRoute is sourceRoute with every router named.
func strictRoute(v6 bool) []ipPacket {
	if v6 {
		return nil
	}
	p := sourceRoute(false)
	p[0].options[0] = 137
	return p
}

// sourceRoute asks routers on the way to a permitted address to use another.
func sourceRoute(v6 bool) []ipPacket {
	p := ipPacket{dst: pick(v6, far4, far6)}.tcp(40004, 8080, tcpSYN, "")
	if v6 {
		p.ext = 43
		p.exts = append([]byte{protoTCP, 2, 0, 1, 0, 0, 0, 0}, netip.MustParseAddr(other6).AsSlice()...)
		return []ipPacket{p}
	}
	p.options = append([]byte{131, 7, 4}, append(netip.MustParseAddr(other4).AsSlice(), 0)...)
	return []ipPacket{p}
}

// hostilePackets are the attempts made with packets.
var hostilePackets = []attempt{
	{name: "metadata service", packets: syn("169.254.169.254", "fd00:ec2::254", 80), reason: "special:metadata"},
	{name: "metadata service of another cloud", packets: syn("100.100.100.200", "fd20:ce::254", 80), reason: "special:metadata"},
	{name: "metadata service as an IPv4-mapped address", packets: syn("", "::ffff:169.254.169.254", 80), reason: "drop_martian_destination"},
	{name: "metadata service as an IPv4-compatible address", packets: syn("", "::169.254.169.254", 80), reason: "special:v4-compat"},
	{name: "metadata service as an IPv4-translated address", packets: syn("", "::ffff:0:169.254.169.254", 80), reason: "special:metadata"},
	{name: "metadata service behind NAT64", packets: syn("", "64:ff9b::a9fe:a9fe", 80), reason: "special:metadata"},
	{name: "metadata service behind a local NAT64", packets: syn("", "64:ff9b:1::a9fe:a9fe", 80), reason: "special:nat64-local"},
	{name: "metadata service behind 6to4", packets: syn("", "2002:a9fe:a9fe::1", 80), reason: "special:metadata"},
	{name: "metadata service behind Teredo", packets: syn("", "2001:0:a9fe:a9fe::5601:5601", 80), reason: "special:metadata"},
	{name: "the unspecified address", packets: syn("0.0.0.0", "::", portWhoami), reason: "drop_martian_destination"},
	{name: "this network", packets: syn("0.1.2.3", "", portWhoami), reason: "special:this-network"},
	{name: "loopback", packets: syn("127.0.0.1", "::1", portWhoami), reason: "drop_martian_destination"},
	{name: "the rest of 127/8", packets: syn("127.1.2.3", "", portWhoami), reason: "drop_martian_destination"},
	{name: "the last of 127/8", packets: syn("127.255.255.254", "", portWhoami), reason: "drop_martian_destination"},
	{name: "loopback as an IPv4-mapped address", packets: syn("", "::ffff:127.0.0.1", portWhoami), reason: "drop_martian_destination"},
	{name: "the gateway's other ports", packets: syn(gateway4, gateway6, portWhoami), reason: "special:gateway"},
	{name: "the gateway's other ports over UDP", packets: one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, gateway4, gateway6)}.udp(40013, portEcho, "LEAK")
	}), reason: "udp_closed_port"},
	{name: "the resolver's other ports", packets: syn(dns4, dns6, portWhoami), reason: "special:dns"},
	{name: "the host's own address", packets: syn(host4, host6, portWhoami), reason: "special:host"},
	{name: "an address that the host got later", packets: syn(late4, late6, portWhoami), reason: "special:host"},
	{name: "a link-local neighbour of the host", packets: syn("169.254.7.7", "", portWhoami), reason: "special:link-local"},
	{name: "a link-local neighbour of the host by IPv6", packets: syn("", "fe80::7", portWhoami), reason: "drop_martian_destination"},
	{name: "multicast", packets: one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, "224.0.0.251", "ff02::fb")}.udp(5353, 5353, "LEAK")
	}), reason: "drop_multicast"},
	{name: "class E", packets: syn("240.0.0.1", "", portWhoami), reason: "special:reserved"},
	{name: "the limited broadcast", packets: one(func(bool) ipPacket { return ipPacket{dst: "255.255.255.255"}.udp(40005, 7000, "LEAK") }), only: "IPv4", reason: "drop_broadcast"},
	{name: "the directed broadcast", packets: one(func(bool) ipPacket { return ipPacket{dst: "10.0.2.255"}.udp(40005, 7000, "LEAK") }), only: "IPv4", reason: "drop_broadcast"},
	{name: "an address that nobody granted", packets: syn(other4, other6, portWhoami), reason: "default"},
	{name: "a port that the rule does not have", packets: syn(far4, far6, portWhoami), reason: "default"},
	{name: "a spoofed source", packets: one(func(v6 bool) ipPacket {
		return ipPacket{src: pick(v6, host4, host6), dst: pick(v6, far4, far6)}.tcp(40006, 8080, tcpSYN, "")
	}), reason: "drop_spoofed_source"},
	{name: "GRE", packets: other(47, 0, 0, 8, 0), reason: "ip_protocol"},
	{name: "SCTP", packets: other(132), reason: "ip_protocol"},
	{name: "IP in IP", packets: other(4, ipPacket{dst: other4}.tcp(40007, 80, tcpSYN, "").bytes()...), reason: "ip_protocol"},
	{name: "ESP", packets: other(50), reason: "ip_protocol"},
	{name: "an echo request with a payload", packets: one(func(v6 bool) ipPacket { return ipPacket{dst: pick(v6, far4, far6)}.echo("LEAK-LEAK-LEAK") }), reason: "default"},
	{name: "an echo reply that nobody asked for", packets: icmp(0, 129), reason: "icmp_not_echo"},
	{name: "an ICMP error about nothing", packets: icmp(3, 1), reason: "stack_icmp_consumed"},
	{name: "an ICMP redirect", packets: icmp(5, 137), reason: "stack_icmp_consumed"},
	{name: "an ICMP timestamp", packets: icmp(13, 13), only: "IPv4", reason: "stack_icmp_consumed"},
	{name: "a first fragment without ports", packets: tinyFirst, reason: "stack_malformed_fragments"},
	{name: "overlapping fragments that rewrite the port", packets: overlap, reason: "default"},
	{name: "one extension header", packets: chain(1), reason: "default"},
	{name: "a long chain of extension headers", packets: chain(12), reason: "default"},
	{name: "options before and behind each other", packets: func(v6 bool) []ipPacket {
		return headers(v6, ipPacket{dst: other6}.tcp(40019, portWhoami, tcpSYN, ""), padded(0), padded(60))
	}, reason: "default"},
	{name: "source routing", packets: sourceRoute, reason: "drop_source_route"},
	{name: "source routing past every router", packets: strictRoute, reason: "drop_source_route"},
	{name: "segment routing", packets: func(v6 bool) []ipPacket { return headers(v6, webSYN(40017), routing(4, 1)) }, reason: "drop_source_route"},
	{name: "a routing header that is used up", packets: func(v6 bool) []ipPacket { return headers(v6, webSYN(40016), routing(0, 0)) }, reason: "drop_source_route"},
	{name: "source routing behind other headers", packets: func(v6 bool) []ipPacket { return headers(v6, webSYN(40015), padded(60), routing(0, 1)) }, reason: "stack_parameter_problems"},
	{name: "SYN and FIN at once", packets: one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, other4, other6)}.tcp(40008, portWhoami, tcpSYN|tcpFIN, "")
	}), reason: "default"},
	{name: "data on a SYN", packets: one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, other4, other6)}.tcp(40009, portWhoami, tcpSYN, "LEAK")
	}), reason: "default"},
	{name: "data without a connection", packets: one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, other4, other6)}.tcp(40010, portWhoami, tcpPSH|tcpACK, "LEAK")
	}), reason: "tcp_no_connection"},
	{name: "a datagram", packets: one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, other4, other6)}.udp(40011, portEcho, "LEAK")
	}), reason: "default"},
	{name: "DNS over TLS", packets: syn(other4, other6, 853), reason: "builtin:dns-over-tls"},
	{name: "DNS over QUIC", packets: one(func(v6 bool) ipPacket {
		return ipPacket{dst: pick(v6, other4, other6)}.udp(40012, 853, "LEAK")
	}), reason: "builtin:dns-over-tls"},
	{name: "DNS over HTTPS by address", packets: syn("8.8.8.8", "2001:4860:4860::8888", 443), reason: "builtin:dns-over-https"},
}
