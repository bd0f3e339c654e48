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

// ask sends the questions from one socket and waits for their answers. In the name, %d stands for
// the question's number.
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
	answered := make(chan *dns.Msg)
	go func() { // ends with the socket, or timeout after the last answer
		defer close(answered)
		buf := make([]byte, 1<<16)
		for {
			conn.SetReadDeadline(time.Now().Add(*timeout))
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			m := new(dns.Msg)
			if m.Unpack(buf[:n]) == nil {
				answered <- m
			}
		}
	}()
	answers := 0
	for i := 0; answers < *count; {
		if i < *count && (*ahead == 0 || i-answers < *ahead) {
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
			i++
			r.Sent++
			select {
			case m, ok := <-answered:
				answers += r.count(m, ok)
			default:
			}
			continue
		}
		m, ok := <-answered
		if !ok {
			break
		}
		answers += r.count(m, ok)
	}
	say(r)
	return nil
}

// count counts an answer, if there is one.
func (r *askedMany) count(m *dns.Msg, ok bool) int {
	if !ok {
		return 0
	}
	r.Codes[dns.RcodeToString[m.Rcode]]++
	for _, rr := range m.Answer {
		switch rr.(type) {
		case *dns.A, *dns.AAAA:
			r.Addrs++
		}
	}
	return 1
}
