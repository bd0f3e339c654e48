package main

// ask puts many questions to a name server at once, and counts the answers.

import (
	"flag"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/miekg/dns"
)

type askedMany struct {
	Sent  int            `json:"sent"`
	Codes map[string]int `json:"codes"` // answers by response code
	Addrs int            `json:"addrs"` // address records in them
}

// ask sends the questions from one socket and waits for their answers. In the name, %d
// is the question's number.
func ask(args []string) error {
	fs := flag.NewFlagSet("ask", flag.ExitOnError)
	count := fs.Int("count", 1, "questions")
	timeout := fs.Duration("timeout", 5*time.Second, "for the answers, after the last question")
	ahead := fs.Int("ahead", 0, "at most so many without an answer; 0: any number")
	qtype := fs.String("type", "A", "of the questions")
	if err := fs.Parse(args); err != nil {
		return err
	}
	server, name := fs.Arg(0), fs.Arg(1)
	conn, err := net.Dial("udp", server)
	if err != nil {
		return err
	}
	defer conn.Close()
	r := askedMany{Codes: map[string]int{}}
	answers := 0
	buf := make([]byte, 1<<16)
	read := func() bool {
		conn.SetReadDeadline(time.Now().Add(*timeout))
		n, err := conn.Read(buf)
		if err != nil {
			return false
		}
		var m dns.Msg
		if m.Unpack(buf[:n]) != nil {
			return true
		}
		answers++
		r.Codes[dns.RcodeToString[m.Rcode]]++
		for _, rr := range m.Answer {
			switch rr.(type) {
			case *dns.A, *dns.AAAA:
				r.Addrs++
			}
		}
		return true
	}
	for i := range *count {
		m := new(dns.Msg)
		m.SetQuestion(strings.ReplaceAll(name, "%d", fmt.Sprint(i))+".", dns.StringToType[*qtype])
		m.SetEdns0(4096, false)
		b, err := m.Pack()
		if err != nil {
			return err
		}
		if _, err := conn.Write(b); err != nil {
			return fmt.Errorf("asking question %d: %w", i, err)
		}
		r.Sent++
		for *ahead > 0 && r.Sent-answers >= *ahead {
			if !read() {
				say(r)
				return nil
			}
		}
	}
	for answers < r.Sent && read() {
	}
	say(r)
	return nil
}
