package sandbox

import (
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/process"
)

// maxSocketWants bounds the guest-namespace sockets that are on their way to the worker.
const maxSocketWants = 64

// giveSocket implements kind.
func (m *run) giveSocket(l *process.WorkerLink, v6 bool) {
	select {
	case m.socketWants <- struct{}{}:
	default:
		return
	}
	// Ends with the guest stage's answer, which closing the guest provokes.
	go func() {
		defer func() { <-m.socketWants }()
		network := "tcp4"
		if v6 {
			network = "tcp6"
		}
		s, err := m.guest.Socket(network)
		if err != nil {
			m.log.Infof("monitor", "make a %s socket for the worker: %v", network, err)
			_ = l.Post(channel.MsgSocket, channel.SocketMessage{V6: v6}) // without one: it may ask again
			return
		}
		defer s.Close()
		_ = l.Post(channel.MsgSocket, channel.SocketMessage{V6: v6}, channel.FDOf(s))
	}()
}
