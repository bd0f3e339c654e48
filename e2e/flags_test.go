package e2e

// Flags of `sluice run` that the tests use in more than one place.

const (
	rootInside = "--root"       // uid 0 inside
	noOffload  = "--no-offload" // a device without checksum and segmentation offloads
)
