package tun

import "sync/atomic"

// reason is why a frame was dropped. The zero value means that it was not.
type reason uint8

// The reasons, with their names in Stats and in captures. A frame is counted under the first that
// applies, in this order.
const (
	reasonNone reason = iota
	shortVnetHeader
	shortFrame
	oversizedFrame
	foreignDestination
	badSource
	vlanTagged
	notEthernetII
	unknownEtherType
	shortARP
	shortIP
	badIPVersion
	badIPHeaderLength
	badIPLength
	badIPChecksum
	checksumOutOfRange
	checksumOnFragment
	unknownGSOType
	gsoNotOffered
	gsoZeroSize
	gsoWithoutChecksum
	gsoProtocolMismatch
	queueFull
	interfaceDown
	writeFailed
	deviceGone
	numReasons
)

var reasonNames = [numReasons]string{
	reasonNone:          "none",
	shortVnetHeader:     "rx-short-virtio-header",
	shortFrame:          "rx-short-frame",
	oversizedFrame:      "rx-oversized-frame",
	foreignDestination:  "rx-foreign-destination",
	badSource:           "rx-bad-source-address",
	vlanTagged:          "rx-vlan-tagged",
	notEthernetII:       "rx-not-ethernet-ii",
	unknownEtherType:    "rx-unknown-ethertype",
	shortARP:            "rx-short-arp",
	shortIP:             "rx-short-ip-header",
	badIPVersion:        "rx-bad-ip-version",
	badIPHeaderLength:   "rx-bad-ip-header-length",
	badIPLength:         "rx-bad-ip-length",
	badIPChecksum:       "rx-bad-ip-checksum",
	checksumOutOfRange:  "rx-checksum-out-of-range",
	checksumOnFragment:  "rx-checksum-on-fragment",
	unknownGSOType:      "rx-unknown-gso-type",
	gsoNotOffered:       "rx-gso-not-offered",
	gsoZeroSize:         "rx-gso-zero-size",
	gsoWithoutChecksum:  "rx-gso-without-checksum",
	gsoProtocolMismatch: "rx-gso-protocol-mismatch",
	queueFull:           "tx-queue-full",
	interfaceDown:       "tx-interface-down",
	writeFailed:         "tx-write-failed",
	deviceGone:          "tx-device-gone",
}

func (r reason) String() string {
	if r >= numReasons {
		return "unknown"
	}
	return reasonNames[r]
}

// Stats are the counters of one Endpoint since it was made. Rx counts frames from the container, Tx
// frames to it; bytes count the link header but not the virtio-net one.
type Stats struct {
	RxFrames uint64 `json:"rxFrames"` // delivered to the stack
	RxBytes  uint64 `json:"rxBytes"`
	RxGSO    uint64 `json:"rxGSO"` // of RxFrames, segments larger than the container's MSS
	// RxBatches counts batches; RxFrames/RxBatches is their mean size.
	RxBatches uint64 `json:"rxBatches"`
	// RxChecksumsFilled counts checksums computed here, because they belong to an inner header or
	// because the dispatcher is not a ChecksumKeeper.
	RxChecksumsFilled uint64 `json:"rxChecksumsFilled"`
	RxErrors          uint64 `json:"rxErrors"` // reads that failed without ending the device

	TxFrames uint64 `json:"txFrames"`
	TxBytes  uint64 `json:"txBytes"`
	TxGSO    uint64 `json:"txGSO"`
	TxWaits  uint64 `json:"txWaits"` // writes that found the queue full and waited

	// Dropped has an entry for every reason, zero or not.
	Dropped map[string]uint64 `json:"dropped"`
	// Noted counts packets passed to NoteDrop.
	Noted uint64 `json:"noted"`
}

// counters is one queue's share of Stats. A queue's reader and writers touch only their own, so
// queues do not contend for cache lines.
type counters struct {
	rxFrames, rxBytes, rxGSO, rxBatches, rxFilled, rxErrors atomic.Uint64

	_ [64]byte // readers and writers run on different cores

	txFrames, txBytes, txGSO, txWaits atomic.Uint64

	dropped [numReasons]atomic.Uint64

	_ [64]byte
}

// Stats returns a snapshot. The counters are read one by one, so their sums may
// be off by frames in flight.
func (e *Endpoint) Stats() Stats {
	s := Stats{Dropped: make(map[string]uint64, numReasons-1)}
	for _, q := range e.queues {
		c := &q.count
		s.RxFrames += c.rxFrames.Load()
		s.RxBytes += c.rxBytes.Load()
		s.RxGSO += c.rxGSO.Load()
		s.RxBatches += c.rxBatches.Load()
		s.RxChecksumsFilled += c.rxFilled.Load()
		s.RxErrors += c.rxErrors.Load()
		s.TxFrames += c.txFrames.Load()
		s.TxBytes += c.txBytes.Load()
		s.TxGSO += c.txGSO.Load()
		s.TxWaits += c.txWaits.Load()
		for r := reasonNone + 1; r < numReasons; r++ {
			s.Dropped[r.String()] += c.dropped[r].Load()
		}
	}
	s.Noted = e.noted.Load()
	return s
}
