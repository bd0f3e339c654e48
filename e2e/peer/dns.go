package main

// A name server with a zone that the tests know, and one that tells each question it
// was asked, so that a test can see which upstream a resolver chose.

import (
	"flag"
	"fmt"
	"net"
	"strings"

	"github.com/miekg/dns"
)

type asked struct {
	Event string `json:"event"` // listening, asked
	Name  string `json:"name,omitempty"`
	Type  string `json:"type,omitempty"`
	Net   string `json:"net,omitempty"`
}

// dnsServe answers A and AAAA of web.test. with the addresses given, TXT of big.test.
// with more than fits a datagram, tag.test. TXT with -tag, what -record says of a name in
// full, and NXDOMAIN for the rest of test.
func dnsServe(args []string) error {
	fs := flag.NewFlagSet("dns", flag.ExitOnError)
	port := fs.String("port", "53", "UDP and TCP port")
	records := map[string][]dns.RR{}
	fs.Func("record", "NAME RECORD: a record in every answer about the name, whatever its own name", func(s string) error {
		name, text, _ := strings.Cut(s, " ")
		rr, err := dns.NewRR(text)
		if err == nil {
			records[name] = append(records[name], rr)
		}
		return err
	})
	web := fs.String("web", "", "addresses of web.test., comma between")
	tag := fs.String("tag", "", "text of tag.test.")
	if err := fs.Parse(args); err != nil {
		return err
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		if len(q.Question) == 1 {
			name := strings.ToLower(q.Question[0].Name)
			for _, rr := range records[name] {
				if t := rr.Header().Rrtype; t == q.Question[0].Qtype || t == dns.TypeCNAME {
					m.Answer = append(m.Answer, rr)
				}
			}
			if records[name] == nil {
				answerQuestion(m, q.Question[0], strings.Split(*web, ","), *tag)
			}
			say(asked{"asked", q.Question[0].Name, dns.TypeToString[q.Question[0].Qtype], w.LocalAddr().Network()})
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
	})
	failed := make(chan error)
	for _, host := range fs.Args() {
		for _, network := range []string{"udp", "tcp"} {
			started := make(chan struct{})
			s := &dns.Server{Addr: net.JoinHostPort(host, *port), Net: network, Handler: handler,
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

func answerQuestion(m *dns.Msg, q dns.Question, web []string, tag string) {
	add := func(format string, args ...any) {
		if rr, err := dns.NewRR(fmt.Sprintf(format, args...)); err == nil {
			m.Answer = append(m.Answer, rr)
		}
	}
	switch name := strings.ToLower(q.Name); {
	case name == "web.test.":
		for _, a := range web {
			if strings.Contains(a, ":") == (q.Qtype == dns.TypeAAAA) && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeAAAA) {
				add("web.test. 60 IN %s %s", dns.TypeToString[q.Qtype], a)
			}
		}
	case name == "big.test." && q.Qtype == dns.TypeTXT:
		for i := range 40 {
			add("big.test. 60 IN TXT %q", fmt.Sprintf("%02d-%s", i, strings.Repeat("x", 90)))
		}
	case name == "tag.test." && q.Qtype == dns.TypeTXT:
		add("tag.test. 60 IN TXT %q", tag)
	default:
		m.Rcode = dns.RcodeNameError
	}
}
