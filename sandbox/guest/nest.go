package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/sandbox/internal/explain"
	"sluice.dev/sluice/sandbox/internal/idmap"
)

// Two stages, so that covered paths stay covered.
//
//	monitor ─ clone ─► outer stage                 ─ clone ─► inner stage ─► CMD
//	                   user namespace U1, mounts:             user namespace U2 below U1,
//	                   covers what CMD must not               a copy of the mounts, network,
//	                   reach, and ends                        IPC and PID namespaces
//
// Root in a user namespace may undo any mount that was made there. A mount that comes from above is
// locked (mount_namespaces(7)): it can neither be unmounted, nor looked under by a bind mount, nor
// made writable again. U2 maps every id of U1 to itself and owns the network, so root in U2 can do
// what root in U1 could have done.
//
// The inner stage is the monitor's child, not the outer one's (CLONE_PARENT). The outer one reports
// the inner one's process ID and ends, so no process is left in U1.

// innerArgument makes StageCommand run as the inner stage.
const innerArgument = "inner"

// nest makes the covers, starts the inner stage and tells the monitor its process ID.
func (s *stage) nest() error {
	sockets, err := s.cover()
	if err != nil {
		return err
	}
	s.spec.Covered = sockets
	if err := s.terminal(); err != nil {
		return err
	}
	flags := uintptr(unix.CLONE_PARENT | unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC)
	if s.spec.Config.PIDNamespace {
		flags |= unix.CLONE_NEWPID
	}
	// Root inside may trace the inner stage, so that must not be in the caller's session either.
	attr := &syscall.SysProcAttr{Cloneflags: flags, AmbientCaps: stageCaps, Setsid: true}
	if fd, found := firstTerminal(); found {
		attr.Setctty, attr.Ctty = true, fd
	}
	if attr.UidMappings, err = sameIDs("/proc/self/uid_map"); err != nil {
		return err
	}
	if attr.GidMappings, err = sameIDs("/proc/self/gid_map"); err != nil {
		return err
	}
	groups, err := os.ReadFile("/proc/self/setgroups")
	if err != nil {
		return err
	}
	attr.GidMappingsEnableSetgroups = strings.TrimSpace(string(groups)) == "allow"
	plan, err := planFile(s.spec)
	if err != nil {
		return err
	}
	defer plan.Close()
	conn, err := s.ch.c.SyscallConn()
	if err != nil {
		return err
	}
	pid := 0
	var ferr error
	err = conn.Control(func(channel uintptr) {
		files := []uintptr{0, 1, 2, channel, plan.Fd(), ^uintptr(0)}
		for i := range s.spec.Files {
			files = append(files, uintptr(firstFileFD+i))
		}
		// No death signal: Go takes a parent that is not the caller to be dead. The inner stage
		// sets it by itself, and sees the channel's end.
		pid, ferr = syscall.ForkExec("/proc/self/exe", []string{"sluice", StageCommand, innerArgument},
			&syscall.ProcAttr{Env: []string{}, Files: files, Sys: attr})
	})
	if ferr != nil {
		return fmt.Errorf("starting the inner stage: %w", explain.ExplainClone(ferr))
	}
	said := os.NewFile(innerFD, "number of the inner stage")
	defer said.Close()
	return errors.Join(err, binary.Write(said, binary.NativeEndian, uint32(pid)))
}

// sameIDs returns a map of every id in this process's user namespace to itself.
func sameIDs(path string) (out []syscall.SysProcIDMap, err error) {
	extents, err := idmap.OwnMap(path)
	for _, e := range extents {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(e.Inside), HostID: int(e.Outside), Size: int(e.Count)})
	}
	return out, err
}

// readInner is the monitor's side of nest. It returns 0 if there is no inner stage.
func readInner(r io.Reader) int {
	var pid uint32
	if err := binary.Read(r, binary.NativeEndian, &pid); err != nil {
		return 0
	}
	return int(pid)
}
