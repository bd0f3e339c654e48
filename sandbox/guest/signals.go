package guest

// The caller's signals. CMD ignores and blocks the signals that it would if the monitor and the
// stage were not between it and the caller. Both are Go programs: the runtime replaces nearly every
// inherited disposition before main, and unblocks some signals. It keeps what it found in
// runtime.fwdSig and runtime.initSigmask but has no function that returns them, so they are read by
// way of the executable's symbol table. A binary without one (-ldflags=-s) sees only what the
// runtime leaves alone: whether SIGHUP, SIGINT, SIGTSTP, SIGTTIN, SIGTTOU and SIGCONT are ignored,
// and most of the blocked signals.

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/signal"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SignalSet has bit n-1 set for signal n.
type SignalSet uint64

func (s SignalSet) has(sig unix.Signal) bool { return s&(1<<(sig-1)) != 0 }

// lastSignal is the kernel's _NSIG.
const lastSignal = 64

// kept are the signals that a Go program cannot do without. CMD has them as exec leaves them.
const kept = SignalSet(1<<(unix.SIGCHLD-1) | 1<<(unix.SIGURG-1) | 1<<(unix.SIGPROF-1) | 1<<(unix.SIGKILL-1) | 1<<(unix.SIGSTOP-1) |
	1<<(unix.SIGSEGV-1) | 1<<(unix.SIGBUS-1) | 1<<(unix.SIGFPE-1) | 1<<(unix.SIGILL-1) | 1<<(unix.SIGTRAP-1) | 1<<(unix.SIGSYS-1) | 3<<31)

// Signals are the signals that a process inherited as ignored and as blocked.
type Signals struct{ Ignored, Blocked SignalSet }

// InheritedSignals returns the signals that this process's caller ignores and blocks. It must be
// called before the first signal.Notify.
func InheritedSignals() (s Signals) {
	var found [lastSignal + 1]uint64
	var began [1]uint64
	readRuntime(map[string][]uint64{"runtime.fwdSig": found[:], "runtime.initSigmask": began[:]})
	for sig := unix.Signal(1); sig <= lastSignal; sig++ {
		if found[sig] == sigIgn || disposition(sig) == sigIgn {
			s.Ignored |= 1 << (sig - 1)
		}
	}
	s.Ignored &^= kept
	var mask unix.Sigset_t
	_ = unix.PthreadSigmask(unix.SIG_BLOCK, nil, &mask) // cannot fail
	s.Blocked = SignalSet(mask.Val[0] | began[0])
	return s
}

// ignore makes this process, and those it starts, ignore what the caller does.
func (s Signals) ignore() {
	for sig := unix.Signal(1); sig <= lastSignal; sig++ {
		if s.Ignored.has(sig) {
			signal.Ignore(sig)
		}
	}
}

// block gives the calling thread, and its children, the caller's mask.
func (s Signals) block() error {
	return unix.PthreadSigmask(unix.SIG_SETMASK, &unix.Sigset_t{Val: [16]uint64{uint64(s.Blocked)}}, nil)
}

// sigIgn is SIG_IGN as a handler.
const sigIgn = 1

// disposition returns the handler that the kernel has for sig.
func disposition(sig unix.Signal) uint64 {
	var act [32]byte // the kernel's struct sigaction; the handler comes first
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), 0, uintptr(unsafe.Pointer(&act)), 8, 0, 0)
	if errno != 0 {
		return 0
	}
	return binary.NativeEndian.Uint64(act[:])
}

// readRuntime reads variables of the runtime by name, each into a slice of its length in words. It
// leaves alone those it cannot read.
func readRuntime(variables map[string][]uint64) {
	exe, err := mapExecutable()
	if err != nil {
		return
	}
	defer func() { _ = unix.Munmap(exe) }()
	f, err := elf.NewFile(bytes.NewReader(exe))
	if err != nil || f.Type != elf.ET_EXEC || f.Class != elf.ELFCLASS64 {
		return
	}
	symbols, names := contents(exe, f.Section(".symtab")), contents(exe, f.Section(".strtab"))
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return
	}
	defer mem.Close()
	for name, words := range variables {
		b := make([]byte, 8*len(words))
		at, found := symbol(symbols, names, name, uint64(len(b)))
		if !found {
			continue
		}
		if _, err := mem.ReadAt(b, at); err != nil {
			continue
		}
		for i := range words {
			words[i] = binary.NativeEndian.Uint64(b[8*i:])
		}
	}
}

// mapExecutable maps this process's executable. Its symbols take 2 MB: reading them into the heap
// would take longer than finding two of them, and start the garbage collector.
func mapExecutable() ([]byte, error) {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
}

// contents returns a section of the mapped executable, or nil if there is no such section.
func contents(exe []byte, s *elf.Section) []byte {
	if s == nil || s.Offset > uint64(len(exe)) || s.FileSize > uint64(len(exe))-s.Offset {
		return nil
	}
	return exe[s.Offset:][:s.FileSize]
}

// symbol finds the address of a variable of size bytes. It searches the table itself because
// elf.File.Symbols builds every symbol and takes a hundred times as long.
func symbol(symbols, names []byte, name string, size uint64) (address int64, found bool) {
	const entry, atValue, atSize = elf.Sym64Size, 8, 16 // offsets in elf.Sym64
	i := bytes.Index(names, []byte("\x00"+name+"\x00")) + 1
	if i == 0 {
		return 0, false
	}
	for ; len(symbols) >= entry; symbols = symbols[entry:] {
		if binary.NativeEndian.Uint32(symbols) == uint32(i) && binary.NativeEndian.Uint64(symbols[atSize:]) == size {
			return int64(binary.NativeEndian.Uint64(symbols[atValue:])), true
		}
	}
	return 0, false
}
