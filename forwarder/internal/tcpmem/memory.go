package tcpmem

import (
	"sluice.dev/sluice/forwarder/internal/admit"
)

// Buffers of one TCP flow inside the stack. The send buffer starts at BufferDefault and may
// grow to BufferMax; the receive buffer starts at ReceiveStart (memory_flow.go).
const (
	BufferMin     = 4 << 10
	BufferDefault = 1 << 20
	BufferMax     = admit.MostBuffered
)
