package guest

// The caller's signals. CMD ignores and blocks what it would without the monitor and the
// stage between it and the caller, which are Go programs: the runtime replaces nearly every
// inherited disposition before main, and unblocks some signals. It keeps what it found in
// runtime.fwdSig and runtime.initSigmask, for which it has no function: they are read by
// the executable's symbol table. A binary without one (-ldflags=-s) knows of what the
// runtime leaves alone: SIGHUP, SIGINT, SIGTSTP, SIGTTIN, SIGTTOU and SIGCONT ignored, and
// of the blocked ones most.

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
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

// kept are signals that a Go program cannot do without. CMD has them as exec leaves them.
const kept = SignalSet(1<<(unix.SIGCHLD-1) | 1<<(unix.SIGURG-1) | 1<<(unix.SIGPROF-1) | 1<<(unix.SIGKILL-1) | 1<<(unix.SIGSTOP-1) |
	1<<(unix.SIGSEGV-1) | 1<<(unix.SIGBUS-1) | 1<<(unix.SIGFPE-1) | 1<<(unix.SIGILL-1) | 1<<(unix.SIGTRAP-1) | 1<<(unix.SIGSYS-1) | 3<<31)

// Signals are what a process has inherited.
type Signals struct{ Ignored, Blocked SignalSet }

// InheritedSignals reads what this process's caller ignores and blocks. It is called before
// the first signal.Notify.
func InheritedSignals() (s Signals) {
	var found [lastSignal + 1]uint64
	readVariable("runtime.fwdSig", found[:])
	for sig := unix.Signal(1); sig <= lastSignal; sig++ {
		if found[sig] == sigIgn || disposition(sig) == sigIgn {
			s.Ignored |= 1 << (sig - 1)
		}
	}
	s.Ignored &^= kept
	var began [1]uint64
	readVariable("runtime.initSigmask", began[:])
	var mask unix.Sigset_t
	_ = unix.PthreadSigmask(unix.SIG_BLOCK, nil, &mask) // cannot fail
	s.Blocked = SignalSet(mask.Val[0] | began[0])
	return s
}

// ignore has this process, and what it starts, ignore what the caller does.
func (s Signals) ignore() {
	for sig := unix.Signal(1); sig <= lastSignal; sig++ {
		if s.Ignored.has(sig) {
			signal.Ignore(sig)
		}
	}
}

// block gives the calling thread, and what it forks, the caller's mask.
func (s Signals) block() error {
	return unix.PthreadSigmask(unix.SIG_SETMASK, &unix.Sigset_t{Val: [16]uint64{uint64(s.Blocked)}}, nil)
}

// sigIgn is SIG_IGN as a handler.
const sigIgn = 1

// disposition is the handler that the kernel has for sig.
func disposition(sig unix.Signal) uint64 {
	var act [32]byte // struct sigaction of the system call; the handler comes first
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), 0, uintptr(unsafe.Pointer(&act)), 8, 0, 0)
	if errno != 0 {
		return 0
	}
	return binary.NativeEndian.Uint64(act[:])
}

// readVariable reads words of the runtime's, or leaves them alone.
func readVariable(name string, words []uint64) {
	b := make([]byte, 8*len(words))
	at, err := symbol(name, int64(len(b)))
	if err != nil {
		return
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return
	}
	defer mem.Close()
	if _, err := mem.ReadAt(b, at); err != nil {
		return
	}
	for i := range words {
		words[i] = binary.NativeEndian.Uint64(b[8*i:])
	}
}

var errNoSymbol = errors.New("no such symbol")

// symbol finds where a variable of size bytes is in this process. elf.File.Symbols would
// take ten times as long.
func symbol(name string, size int64) (int64, error) {
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	symbols, names := f.Section(".symtab"), f.Section(".strtab")
	if symbols == nil || names == nil || f.Type != elf.ET_EXEC || f.Class != elf.ELFCLASS64 {
		return 0, errNoSymbol
	}
	text, err := names.Data()
	if err != nil {
		return 0, err
	}
	i := bytes.Index(text, []byte("\x00"+name+"\x00")) + 1
	table, err := symbols.Data()
	if i == 0 || err != nil {
		return 0, errors.Join(errNoSymbol, err)
	}
	for ; len(table) >= elf.Sym64Size; table = table[elf.Sym64Size:] {
		if f.ByteOrder.Uint32(table) != uint32(i) {
			continue
		}
		var s elf.Sym64
		if err := binary.Read(io.LimitReader(bytes.NewReader(table), elf.Sym64Size), f.ByteOrder, &s); err != nil {
			return 0, err
		}
		if int64(s.Size) == size {
			return int64(s.Value), nil
		}
	}
	return 0, errNoSymbol
}
