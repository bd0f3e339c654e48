package tun

import (
	"fmt"
	"io"
	"net"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// BenchmarkKernel moves bytes between the kernel's TCP and netstack's, with nothing
// behind netstack: the ceiling of any proxy built on this device.
//
//	go test -run - -bench Kernel -benchtime 2s ./tun
func BenchmarkKernel(b *testing.B) {
	const chunk = 256 << 10
	for _, mtu := range []int{1500, 65520} {
		for _, up := range []bool{true, false} {
			name := fmt.Sprintf("down/%d", mtu)
			if up {
				name = fmt.Sprintf("up/%d", mtu)
			}
			b.Run(name, func(b *testing.B) {
				ns := newNamespace(b)
				e := kernelEndpoint(b, kernelDevice(b, ns, Config{MTU: mtu}))
				s := newStack(b, e, true)
				l, err := gonet.ListenTCP(s, tcpip.FullAddress{NIC: testNIC, Addr: address(gateway4), Port: 7}, header.IPv4ProtocolNumber)
				if err != nil {
					b.Fatal(err)
				}
				defer l.Close()
				accepted := make(chan net.Conn)
				go func() { // ends when l is closed or one connection came
					if c, err := l.Accept(); err == nil {
						accepted <- c
					}
				}()
				var from, to net.Conn
				ns.do(b, func() (err error) {
					from, err = net.Dial("tcp", net.JoinHostPort(gateway4, "7"))
					return err
				})
				defer from.Close()
				to = <-accepted
				defer to.Close()
				if !up {
					from, to = to, from
				}
				b.SetBytes(chunk)
				b.ResetTimer()
				go func() { // ends when from is closed
					buf := make([]byte, chunk)
					for {
						if _, err := from.Write(buf); err != nil {
							return
						}
					}
				}()
				buf := make([]byte, chunk)
				for range b.N {
					if _, err := io.ReadFull(to, buf); err != nil {
						b.Fatal(err)
					}
				}
				b.StopTimer()
				st := e.Stats()
				b.ReportMetric(float64(st.RxFrames)/float64(max(st.RxBatches, 1)), "frames/batch")
			})
		}
	}
}
