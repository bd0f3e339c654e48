package dhcp

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

var (
	guestMAC   = net.HardwareAddr{2, 0, 0, 0, 1, 100}
	gatewayMAC = net.HardwareAddr{2, 0, 0, 0, 1, 2}
	linkLocal  = netip.MustParseAddr("fe80::100")
)

func config() Config {
	return Config{
		Guest4:     netip.MustParsePrefix("10.0.2.100/24"),
		Gateway4:   netip.MustParseAddr("10.0.2.2"),
		Guest6:     netip.MustParsePrefix("fd00:a::64/64"),
		Gateway6:   netip.MustParseAddr("fe80::2"),
		DNS:        []netip.Addr{netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fd00:a::3")},
		Search:     []string{"a.example", "b.example."},
		MTU:        65520,
		GatewayMAC: gatewayMAC,
		Hostname:   "box",
	}
}

func newServer(t testing.TB, edit ...func(*Config)) *Server {
	t.Helper()
	cfg := config()
	for _, e := range edit {
		e(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func request4(t testing.TB, mtype dhcpv4.MessageType, mods ...dhcpv4.Modifier) []byte {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(guestMAC), dhcpv4.WithMessageType(mtype)}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m.ToBytes()
}

func ip(s string) net.IP { return net.ParseIP(s) }

func TestHandleV4(t *testing.T) {
	serverID := func(s string) dhcpv4.Modifier { return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(ip(s))) }
	wants := func(s string) dhcpv4.Modifier { return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(ip(s))) }
	const (
		none  = dhcpv4.MessageTypeNone
		offer = dhcpv4.MessageTypeOffer
		ack   = dhcpv4.MessageTypeAck
		nak   = dhcpv4.MessageTypeNak

		toGuest = "10.0.2.100:68"
		toAll   = "255.255.255.255:68"
	)
	rows := []struct {
		about string
		req   []byte
		want  dhcpv4.MessageType
		to    string
	}{
		{"DISCOVER is offered the guest's address", request4(t, dhcpv4.MessageTypeDiscover), offer, toGuest},
		{"DISCOVER that cannot hear unicast is answered by broadcast", request4(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithBroadcast(true)), offer, toAll},
		{"DISCOVER that wishes another address is offered the guest's", request4(t, dhcpv4.MessageTypeDiscover, wants("10.0.2.7")), offer, toGuest},
		{"DISCOVER with rapid commit has it at once", request4(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithGeneric(dhcpv4.OptionRapidCommit, nil)), ack, toGuest},
		{"REQUEST of the offer is granted", request4(t, dhcpv4.MessageTypeRequest, serverID("10.0.2.2"), wants("10.0.2.100")), ack, toGuest},
		{"REQUEST of another address is refused", request4(t, dhcpv4.MessageTypeRequest, serverID("10.0.2.2"), wants("10.0.2.7")), nak, toAll},
		{"REQUEST to another server is not ours", request4(t, dhcpv4.MessageTypeRequest, serverID("10.0.2.9"), wants("10.0.2.100")), none, ""},
		{"a rebooted guest keeps its address", request4(t, dhcpv4.MessageTypeRequest, wants("10.0.2.100")), ack, toGuest},
		{"a guest from elsewhere starts over", request4(t, dhcpv4.MessageTypeRequest, wants("192.168.1.5")), nak, toAll},
		{"a lease is renewed", request4(t, dhcpv4.MessageTypeRequest, dhcpv4.WithClientIP(ip("10.0.2.100"))), ack, toGuest},
		{"another lease is not", request4(t, dhcpv4.MessageTypeRequest, dhcpv4.WithClientIP(ip("10.0.2.7"))), nak, toAll},
		{"REQUEST of nothing is not answered", request4(t, dhcpv4.MessageTypeRequest), none, ""},
		{"INFORM is told the rest", request4(t, dhcpv4.MessageTypeInform, dhcpv4.WithClientIP(ip("10.0.2.100"))), ack, toGuest},
		{"INFORM from a made-up address cannot aim the answer", request4(t, dhcpv4.MessageTypeInform, dhcpv4.WithClientIP(ip("192.0.2.1"))), ack, toAll},
		{"RELEASE wants no answer", request4(t, dhcpv4.MessageTypeRelease, dhcpv4.WithClientIP(ip("10.0.2.100"))), none, ""},
		{"DECLINE wants no answer", request4(t, dhcpv4.MessageTypeDecline, wants("10.0.2.100")), none, ""},
		{"a server's message is not answered", request4(t, dhcpv4.MessageTypeOffer), none, ""},
		{"a reply is not answered", request4(t, dhcpv4.MessageTypeDiscover, func(d *dhcpv4.DHCPv4) { d.OpCode = dhcpv4.OpcodeBootReply }), none, ""},
		{"BOOTP is not answered", request4(t, dhcpv4.MessageTypeNone, func(d *dhcpv4.DHCPv4) { d.DeleteOption(dhcpv4.OptionDHCPMessageType) }), none, ""},
		{"relayed messages are not answered", request4(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithGatewayIP(ip("10.0.2.9"))), none, ""},
		{"an odd hardware address is not answered", request4(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithHwAddr(net.HardwareAddr{1, 2, 3})), none, ""},
		{"no bytes are not answered", nil, none, ""},
		{"a short packet is not answered", request4(t, dhcpv4.MessageTypeDiscover)[:239], none, ""},
		{"a message longer than any is not answered", append(request4(t, dhcpv4.MessageTypeDiscover), make([]byte, maxRequest)...), none, ""},
	}
	s := newServer(t)
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			b, broadcast, to := s.HandleV4(row.req)
			if row.want == none {
				if b != nil {
					t.Fatalf("answered %x", b)
				}
				return
			}
			m, err := dhcpv4.FromBytes(b)
			if err != nil {
				t.Fatal(err)
			}
			if m.MessageType() != row.want || to.String() != row.to || broadcast != (row.to == toAll) {
				t.Errorf("got %v to %v, broadcast %v", m.MessageType(), to, broadcast)
			}
			req, _ := dhcpv4.FromBytes(row.req)
			if m.TransactionID != req.TransactionID || m.ClientHWAddr.String() != guestMAC.String() || !m.ServerIdentifier().Equal(ip("10.0.2.2")) {
				t.Errorf("not an answer to it: %v", m.Summary())
			}
			if row.want == nak {
				if !m.YourIPAddr.Equal(net.IPv4zero) || len(m.DNS()) != 0 {
					t.Errorf("a refusal that says more: %v", m.Summary())
				}
				return
			}
			inform := req.MessageType() == dhcpv4.MessageTypeInform
			if inform != m.YourIPAddr.Equal(net.IPv4zero) || inform != (m.IPAddressLeaseTime(0) == 0) {
				t.Errorf("address %v, lease %v", m.YourIPAddr, m.IPAddressLeaseTime(0))
			}
			if !inform && !m.YourIPAddr.Equal(ip("10.0.2.100")) {
				t.Errorf("address %v", m.YourIPAddr)
			}
			got := fmt.Sprintln(m.SubnetMask(), m.Router(), m.DNS(), m.HostName(), m.DomainName(), m.DomainSearch().Labels, m.Options.Get(dhcpv4.OptionInterfaceMTU))
			if want := "ffffff00 [10.0.2.2] [10.0.2.3] box a.example [a.example b.example] [255 240]\n"; got != want {
				t.Errorf("told\n%s\nnot\n%s", got, want)
			}
		})
	}
}

func TestV4GatewayOutsideTheGuestsPrefixHasARoute(t *testing.T) {
	s := newServer(t, func(c *Config) { c.Guest4 = netip.MustParsePrefix("10.0.2.100/32") })
	b, _, _ := s.HandleV4(request4(t, dhcpv4.MessageTypeDiscover))
	m, err := dhcpv4.FromBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(m.ClasslessStaticRoute()); !strings.Contains(got, "10.0.2.2/32") || !strings.Contains(got, "0.0.0.0/0") {
		t.Errorf("routes %s", got)
	}
}

func TestV4AnswersFitWhatTheClientTakes(t *testing.T) {
	s := newServer(t, func(c *Config) {
		for i := range 40 {
			c.Search = append(c.Search, fmt.Sprintf("department-%02d.long-company-name.example", i))
		}
	})
	for _, row := range []struct{ says, limit int }{{0, 576}, {300, 576}, {576, 576}, {900, 900}, {9000, 1500}} {
		var mods []dhcpv4.Modifier
		if row.says != 0 {
			mods = append(mods, dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(uint16(row.says))))
		}
		b, _, _ := s.HandleV4(request4(t, dhcpv4.MessageTypeDiscover, mods...))
		if len(b)+headers4 > row.limit || len(b)+headers4 < row.limit-60 {
			t.Errorf("a client that takes %d gets a datagram of %d", row.says, len(b)+headers4)
		}
		if m, err := dhcpv4.FromBytes(b); err != nil || m.DomainSearch().Labels[0] != "a.example" {
			t.Errorf("%v, %v", m, err)
		}
	}
}

func request6(t testing.TB, mtype dhcpv6.MessageType, opts ...dhcpv6.Option) []byte {
	t.Helper()
	m := &dhcpv6.Message{MessageType: mtype, TransactionID: dhcpv6.TransactionID{1, 2, 3}}
	for _, o := range opts {
		m.AddOption(o)
	}
	return m.ToBytes()
}

func TestHandleV6(t *testing.T) {
	cid := dhcpv6.OptClientID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: guestMAC})
	sid := dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: gatewayMAC})
	other := dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: guestMAC})
	rapid := &dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit}
	na := func(id byte, addrs ...string) dhcpv6.Option {
		o := &dhcpv6.OptIANA{IaId: [4]byte{id}}
		for _, a := range addrs {
			o.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: ip(a)})
		}
		return o
	}
	pd := &dhcpv6.OptIAPD{IaId: [4]byte{9}}
	ta := &dhcpv6.OptIATA{IaId: [4]byte{8}}
	const (
		adv     = dhcpv6.MessageTypeAdvertise
		rep     = dhcpv6.MessageTypeReply
		silence = dhcpv6.MessageType(0)
	)
	rows := []struct {
		about string
		req   []byte
		want  dhcpv6.MessageType
		ias   string // per association: id=address/lifetime or status
	}{
		{"SOLICIT is advertised the guest's address", request6(t, dhcpv6.MessageTypeSolicit, cid, na(1)), adv, "1=fd00:a::64/24h0m0s"},
		{"SOLICIT that wishes another is advertised the guest's", request6(t, dhcpv6.MessageTypeSolicit, cid, na(1, "fd00:a::99")), adv, "1=fd00:a::64/24h0m0s"},
		{"SOLICIT with rapid commit has it at once", request6(t, dhcpv6.MessageTypeSolicit, cid, rapid, na(1)), rep, "1=fd00:a::64/24h0m0s"},
		{"a second association gets none, nor do prefixes and temporary ones", request6(t, dhcpv6.MessageTypeSolicit, cid, na(1), na(2), pd, ta), adv, "1=fd00:a::64/24h0m0s 2=NoAddrsAvail 9=NoPrefixAvail 8=NoAddrsAvail"},
		{"REQUEST is granted", request6(t, dhcpv6.MessageTypeRequest, cid, sid, na(1, "fd00:a::64")), rep, "1=fd00:a::64/24h0m0s"},
		{"RENEW is granted, and ends other addresses", request6(t, dhcpv6.MessageTypeRenew, cid, sid, na(1, "fd00:a::64", "fd00:b::1")), rep, "1=fd00:a::64/24h0m0s 1=fd00:b::1/0s"},
		{"REBIND is granted", request6(t, dhcpv6.MessageTypeRebind, cid, na(1, "fd00:a::64")), rep, "1=fd00:a::64/24h0m0s"},
		{"CONFIRM of the guest's address holds", request6(t, dhcpv6.MessageTypeConfirm, cid, na(1, "fd00:a::64")), rep, "Success"},
		{"CONFIRM of another one does not", request6(t, dhcpv6.MessageTypeConfirm, cid, na(1, "fd00:b::1")), rep, "NotOnLink"},
		{"CONFIRM of nothing is not answered", request6(t, dhcpv6.MessageTypeConfirm, cid, na(1)), silence, ""},
		{"RELEASE succeeds", request6(t, dhcpv6.MessageTypeRelease, cid, sid, na(1, "fd00:a::64")), rep, "Success"},
		{"DECLINE succeeds", request6(t, dhcpv6.MessageTypeDecline, cid, sid, na(1, "fd00:a::64")), rep, "Success"},
		{"INFORMATION-REQUEST needs no names", request6(t, dhcpv6.MessageTypeInformationRequest), rep, ""},
		{"INFORMATION-REQUEST with an association is malformed", request6(t, dhcpv6.MessageTypeInformationRequest, cid, na(1)), silence, ""},
		{"SOLICIT without a client's name is malformed", request6(t, dhcpv6.MessageTypeSolicit, na(1)), silence, ""},
		{"SOLICIT with a server's name is malformed", request6(t, dhcpv6.MessageTypeSolicit, cid, sid, na(1)), silence, ""},
		{"REQUEST without a server's name is malformed", request6(t, dhcpv6.MessageTypeRequest, cid, na(1)), silence, ""},
		{"REQUEST to another server is not ours", request6(t, dhcpv6.MessageTypeRequest, cid, other, na(1)), silence, ""},
		{"INFORMATION-REQUEST to another server is not ours", request6(t, dhcpv6.MessageTypeInformationRequest, other), silence, ""},
		{"a server's message is not answered", request6(t, adv, cid, na(1)), silence, ""},
		{"relayed messages are not answered", request6(t, dhcpv6.MessageTypeRelayForward, cid), silence, ""},
		{"no bytes are not answered", nil, silence, ""},
		{"a short packet is not answered", []byte{1, 2, 3}, silence, ""},
		{"a cut option is not answered", request6(t, dhcpv6.MessageTypeSolicit, cid, na(1))[:30], silence, ""},
		{"a message longer than any is not answered", append(request6(t, dhcpv6.MessageTypeSolicit, cid, na(1)), make([]byte, maxRequest)...), silence, ""},
	}
	s := newServer(t)
	for _, row := range rows {
		t.Run(row.about, func(t *testing.T) {
			b := s.HandleV6(row.req, linkLocal)
			if row.want == silence {
				if b != nil {
					t.Fatalf("answered %x", b)
				}
				return
			}
			m, err := dhcpv6.MessageFromBytes(b)
			if err != nil {
				t.Fatal(err)
			}
			if m.MessageType != row.want || m.TransactionID != (dhcpv6.TransactionID{1, 2, 3}) || m.Options.ServerID() == nil {
				t.Errorf("got %v", m.Summary())
			}
			var ias []string
			status := func(pre string, o *dhcpv6.OptStatusCode) {
				if o != nil {
					ias = append(ias, pre+o.StatusCode.String())
				}
			}
			for _, o := range m.Options.Options {
				switch o := o.(type) {
				case *dhcpv6.OptIANA:
					for _, a := range o.Options.Addresses() {
						ias = append(ias, fmt.Sprintf("%d=%v/%v", o.IaId[0], a.IPv6Addr, a.ValidLifetime))
					}
					status(fmt.Sprintf("%d=", o.IaId[0]), o.Options.Status())
				case *dhcpv6.OptIATA:
					status(fmt.Sprintf("%d=", o.IaId[0]), o.Options.Status())
				case *dhcpv6.OptIAPD:
					for _, in := range o.Options.Options {
						status(fmt.Sprintf("%d=", o.IaId[0]), in.(*dhcpv6.OptStatusCode))
					}
				}
			}
			status("", m.Options.Status())
			if got := strings.Join(ias, " "); got != row.ias {
				t.Errorf("associations %q, want %q", got, row.ias)
			}
			if got := fmt.Sprint(m.Options.DNS(), m.Options.DomainSearchList().Labels); got != "[fd00:a::3] [a.example b.example]" {
				t.Errorf("told %s", got)
			}
		})
	}
	if s.HandleV6(rows[0].req, netip.MustParseAddr("ff02::1")) != nil || s.HandleV6(rows[0].req, netip.IPv6Unspecified()) != nil {
		t.Error("answered a sender that cannot be one")
	}
}

func TestFamiliesNotServedAreSilent(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	if b, _, _ := s.HandleV4(request4(t, dhcpv4.MessageTypeDiscover)); b != nil {
		t.Error("DHCPv4 answered")
	}
	if s.HandleV6(request6(t, dhcpv6.MessageTypeInformationRequest), linkLocal) != nil {
		t.Error("DHCPv6 answered")
	}
	if s.RouterAdvertisement() != nil {
		t.Error("advertised")
	}
}

func TestNewRefuses(t *testing.T) {
	for about, edit := range map[string]func(*Config){
		"an IPv6 prefix for IPv4":         func(c *Config) { c.Guest4 = c.Guest6 },
		"an IPv4 prefix for IPv6":         func(c *Config) { c.Guest6 = c.Guest4 },
		"no IPv4 gateway":                 func(c *Config) { c.Gateway4 = netip.Addr{} },
		"a router that is not link-local": func(c *Config) { c.Gateway6 = netip.MustParseAddr("fd00:a::2") },
		"a MAC of eight bytes":            func(c *Config) { c.GatewayMAC = make(net.HardwareAddr, 8) },
		"an MTU beyond 16 bits":           func(c *Config) { c.MTU = 65536 },
		"a host name of 256 bytes":        func(c *Config) { c.Hostname = strings.Repeat("x", 256) },
	} {
		cfg := config()
		edit(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s was taken", about)
		}
	}
}

func TestValidSolicitation(t *testing.T) {
	rs := func(opts ...byte) []byte { return append([]byte{133, 0, 0, 0, 0, 0, 0, 0}, opts...) }
	slla := []byte{1, 1, 2, 0, 0, 0, 1, 100}
	for _, row := range []struct {
		about string
		msg   []byte
		from  netip.Addr
		hop   uint8
		want  bool
	}{
		{"a bare one", rs(), linkLocal, 255, true},
		{"one with a link address", rs(slla...), linkLocal, 255, true},
		{"one from a host without an address yet", rs(), netip.IPv6Unspecified(), 255, true},
		{"but that cannot have a link address", rs(slla...), netip.IPv6Unspecified(), 255, false},
		{"one that passed a router", rs(), linkLocal, 254, false},
		{"one with a code", append([]byte{133, 1}, rs()[2:]...), linkLocal, 255, false},
		{"an advertisement", append([]byte{134}, rs()[1:]...), linkLocal, 255, false},
		{"a short one", rs()[:7], linkLocal, 255, false},
		{"an option of no length", rs(1, 0, 0, 0, 0, 0, 0, 0), linkLocal, 255, false},
		{"an option beyond the end", rs(1, 2, 0, 0, 0, 0, 0, 0), linkLocal, 255, false},
		{"half an option", rs(1), linkLocal, 255, false},
		{"no bytes", nil, linkLocal, 255, false},
		{"one from a group", rs(), netip.MustParseAddr("ff02::1"), 255, false},
	} {
		if got := ValidSolicitation(row.msg, row.from, row.hop); got != row.want {
			t.Errorf("%s: %v", row.about, got)
		}
	}
}

func TestAdvertisementFitsTheSmallestPath(t *testing.T) {
	s := newServer(t, func(c *Config) {
		c.Search = nil
		for i := range 40 {
			c.Search = append(c.Search, fmt.Sprintf("department-%02d.%s.example", i, strings.Repeat("x", 60)))
			c.DNS = append(c.DNS, netip.MustParseAddr(fmt.Sprintf("fd00:a::%x", 16+i)))
		}
	})
	b := s.RouterAdvertisement()
	if len(b) > maxAdvertisement || len(b) < maxAdvertisement-100 {
		t.Errorf("%d bytes", len(b))
	}
	for opts := b[16:]; len(opts) > 0; opts = opts[8*int(opts[1]):] {
		if opts[1] == 0 || 8*int(opts[1]) > len(opts) {
			t.Fatalf("malformed option %x", opts)
		}
	}
}

func FuzzHandle(f *testing.F) {
	f.Add(request4(f, dhcpv4.MessageTypeDiscover))
	f.Add(request4(f, dhcpv4.MessageTypeRequest, dhcpv4.WithClientIP(ip("10.0.2.100"))))
	f.Add(request6(f, dhcpv6.MessageTypeInformationRequest))
	f.Add(request6(f, dhcpv6.MessageTypeSolicit, dhcpv6.OptClientID(&dhcpv6.DUIDLL{LinkLayerAddr: guestMAC}), &dhcpv6.OptIANA{}))
	f.Add([]byte{133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 100})
	s := newServer(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if out, _, to := s.HandleV4(b); out != nil {
			if len(out) > maxDatagram4-headers4+maxRequest { // a long client identifier is echoed
				t.Fatalf("%d bytes", len(out))
			}
			if _, err := dhcpv4.FromBytes(out); err != nil || !to.IsValid() {
				t.Fatalf("answered %x to %v: %v", out, to, err)
			}
		}
		if out := s.HandleV6(b, linkLocal); out != nil {
			if _, err := dhcpv6.MessageFromBytes(out); err != nil || len(out) > maxReply6 {
				t.Fatalf("answered %x: %v", out, err)
			}
		}
		ValidSolicitation(b, linkLocal, 255)
	})
}
