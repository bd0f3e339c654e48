package main

// The DNS load asks for one name again and again, keeping a window of questions under way over one
// socket. It asks a name server directly, and the gate of a sandbox whose policy allows the name
// and whose upstream is that server.

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"
)

const (
	namesPort   = 5353
	askedName   = "asked.test"
	askedAddr   = "198.51.100.77"
	gateAddr    = "10.0.2.3" // a sandbox's resolver
	answerLen   = 512
	namesPolicy = `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata: {name: names}
spec: {defaultAction: reject, egress: [{action: allow, to: [{domain: ` + askedName + `}]}, {action: allow, to: [{entity: host-loopback}]}]}
`
)

// askedQuestion asks for the address of askedName; its first two bytes are its number.
func askedQuestion() []byte {
	q := []byte{0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	q = append(q, "\x05asked\x04test\x00"...)
	return append(q, 0, 1, 0, 1)
}

// isAnswer reports whether b answers a question with a record.
func isAnswer(b []byte) bool {
	return len(b) > 12 && b[2]&0x80 != 0 && b[3]&0xf == 0 && binary.BigEndian.Uint16(b[6:]) > 0
}

// startNameServer starts dnsmasq in the namespace "host", if it is on this machine.
func (f *fleet) startNameServer() error {
	if f.names != nil {
		return nil
	}
	path, err := exec.LookPath("dnsmasq")
	if err != nil {
		return fmt.Errorf("dnsmasq: %w", errAbsent)
	}
	cmd := f.command(path, "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=", "--bind-interfaces", "--listen-address=127.0.0.1",
		fmt.Sprintf("--port=%d", namesPort), "--local-ttl=600", "--address=/"+askedName+"/"+askedAddr)
	if f.names, err = startProcess(cmd); err != nil {
		return fmt.Errorf("starting dnsmasq: %w", err)
	}
	for limit := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := askOnce(fmt.Sprintf("127.0.0.1:%d", namesPort))
		if err == nil {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("dnsmasq does not answer: %w: %s", err, f.names.stderr)
		}
	}
}

func askOnce(server string) error {
	c, err := net.Dial("udp", server)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := c.Write(askedQuestion()); err != nil {
		return err
	}
	b := make([]byte, answerLen)
	n, err := c.Read(b)
	if err == nil && !isAnswer(b[:n]) {
		err = fmt.Errorf("it answers %x: %w", b[:n], os.ErrInvalid)
	}
	return err
}

// dnsProbe compares the rates of answers.
func dnsProbe(t timing) probe {
	const name = "dns/v4"
	return probe{name: name, mtu: 65520, family: "v4", candidates: []string{withNames, host}, turns: t.turns, cells: []string{name + "/rate", name + "/loss"},
		run: func(f *fleet, i *instance, target string) (map[string]float64, error) {
			q := request{Op: "udp", Addr: target, Port: namesPort, Speaks: "dns", Window: batch, WarmMS: t.warm, MS: t.small}
			if i.name == withNames {
				q.Addr, q.Port = gateAddr, 53
			}
			return datagramCells(i, q, name)
		}}
}
