package main

// A name server with a zone that the tests know. It reports each question that it is asked, so that
// a test sees which upstream a resolver chose.

import (
	"bufio"
	"encoding/base64"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/miekg/dns"
)

type asked struct {
	Event string `json:"event"` // listening, asked
	Name  string `json:"name,omitempty"`
	Type  string `json:"type,omitempty"`
	Net   string `json:"net,omitempty"`
}

// zone holds the answers: A and AAAA of web.test. with the given addresses, TXT of big.test. with
// more than fits a datagram, TXT of tag.test. with a tag, and what the fields say about other
// names. Any other name gets NXDOMAIN.
type zone struct {
	records  map[string][]dns.RR // in every answer about the name, whatever their own name
	turns    map[string][]dns.RR // of each type, one per answer
	raw      map[string][]byte   // what follows the question
	many     string              // names with this ending have 64 addresses
	held     string              // names with this ending are answered once released
	released chan struct{}
	web      []string
	tag      string

	mu   sync.Mutex // guards turn
	turn map[dns.Question]int
}

// dnsServe serves a zone on each address. Names with the ending of -hold are answered once a line
// arrives on its input.
func dnsServe(args []string) error {
	z := &zone{records: map[string][]dns.RR{}, turns: map[string][]dns.RR{}, raw: map[string][]byte{}, released: make(chan struct{}), turn: map[dns.Question]int{}}
	fs := flag.NewFlagSet("dns", flag.ExitOnError)
	port := fs.String("port", "53", "UDP and TCP port")
	to := func(m map[string][]dns.RR) func(string) error {
		return func(s string) error {
			name, text, _ := strings.Cut(s, " ")
			rr, err := dns.NewRR(text)
			if err == nil {
				m[name] = append(m[name], rr)
			}
			return err
		}
	}
	fs.Func("record", "NAME RECORD: a record in every answer about the name, whatever its own name", to(z.records))
	fs.Func("turn", "NAME RECORD: one of the name's records of a type in each answer, each in turn", to(z.turns))
	fs.Func("raw", "NAME BASE64: what follows the question in answers about the name, which count one record", func(s string) (err error) {
		name, text, _ := strings.Cut(s, " ")
		z.raw[name], err = base64.StdEncoding.DecodeString(text)
		return err
	})
	fs.StringVar(&z.many, "many", "", "names that end so have 64 addresses")
	fs.StringVar(&z.held, "hold", "", "names that end so are answered once a line was read from the input")
	web := fs.String("web", "", "addresses of web.test., comma between")
	fs.StringVar(&z.tag, "tag", "", "text of tag.test.")
	if err := fs.Parse(args); err != nil {
		return err
	}
	z.web = strings.Split(*web, ",")
	go func() { // ends with the input
		if bufio.NewScanner(os.Stdin).Scan() {
			close(z.released)
		}
	}()
	failed := make(chan error)
	for _, host := range fs.Args() {
		for _, network := range []string{"udp", "tcp"} {
			started := make(chan struct{})
			s := &dns.Server{Addr: net.JoinHostPort(host, *port), Net: network, Handler: z,
				NotifyStartedFunc: func() { close(started) }}
			go func() { failed <- s.ListenAndServe() }()
			select {
			case <-started:
			case err := <-failed:
				return err
			}
		}
	}
	say(asked{Event: "listening"})
	return <-failed
}

// ServeDNS implements dns.Handler.
func (z *zone) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	if len(q.Question) == 1 {
		name := strings.ToLower(q.Question[0].Name)
		say(asked{"asked", q.Question[0].Name, dns.TypeToString[q.Question[0].Qtype], w.LocalAddr().Network()})
		if z.held != "" && strings.HasSuffix(name, z.held) {
			<-z.released
		}
		if after := z.raw[name]; after != nil {
			if b, err := m.Pack(); err == nil {
				b[7] = 1
				w.Write(append(b, after...))
			}
			return
		}
		z.answer(m, q.Question[0], name)
	}
	if w.LocalAddr().Network() == "udp" {
		size := dns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = int(opt.UDPSize())
			m.SetEdns0(opt.UDPSize(), false)
		}
		m.Truncate(size)
	}
	w.WriteMsg(m)
}

// answer fills in the records; name is the question's, in lower case.
func (z *zone) answer(m *dns.Msg, q dns.Question, name string) {
	add := func(format string, args ...any) {
		if rr, err := dns.NewRR(fmt.Sprintf(format, args...)); err == nil {
			m.Answer = append(m.Answer, rr)
		}
	}
	switch {
	case z.records[name] != nil:
		for _, rr := range z.records[name] {
			if t := rr.Header().Rrtype; t == q.Qtype || t == dns.TypeCNAME {
				m.Answer = append(m.Answer, rr)
			}
		}
	case z.turns[name] != nil:
		z.takeTurns(m, q, name)
	case z.many != "" && strings.HasSuffix(name, z.many):
		for i := range 64 {
			switch q.Qtype {
			case dns.TypeA:
				add("%s 60 IN A %s", q.Name, netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}))
			case dns.TypeAAAA:
				add("%s 60 IN AAAA 2001:db8:3::%x", q.Name, i)
			}
		}
	case name == "web.test.":
		for _, a := range z.web {
			if strings.Contains(a, ":") == (q.Qtype == dns.TypeAAAA) && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeAAAA) {
				add("web.test. 60 IN %s %s", dns.TypeToString[q.Qtype], a)
			}
		}
	case name == "big.test." && q.Qtype == dns.TypeTXT:
		for i := range 40 {
			add("big.test. 60 IN TXT %q", fmt.Sprintf("%02d-%s", i, strings.Repeat("x", 90)))
		}
	case name == "tag.test." && q.Qtype == dns.TypeTXT:
		add("tag.test. 60 IN TXT %q", z.tag)
	default:
		m.Rcode = dns.RcodeNameError
	}
}

// takeTurns adds the record whose turn it is.
func (z *zone) takeTurns(m *dns.Msg, q dns.Question, name string) {
	var of []dns.RR
	for _, rr := range z.turns[name] {
		if rr.Header().Rrtype == q.Qtype {
			of = append(of, rr)
		}
	}
	if len(of) == 0 {
		return
	}
	q.Name = name
	z.mu.Lock()
	defer z.mu.Unlock()
	m.Answer = append(m.Answer, of[z.turn[q]%len(of)])
	z.turn[q]++
}
