package main

// The agent is the command that a test runs in a sandbox. It starts the programs that JSON lines on
// its standard input ask for, and reports what they print and how they end. When its input ends it
// kills those still running and exits with status 0, so that a sandbox never outlives the test that
// made it.

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
)

type request struct {
	ID   int      `json:"id"`
	Op   string   `json:"op"` // start, stdin, eof, signal
	Argv []string `json:"argv,omitempty"`
	Env  []string `json:"env,omitempty"`
	Data []byte   `json:"data,omitempty"`
	Sig  int      `json:"sig,omitempty"`
}

type event struct {
	Ready  bool   `json:"ready,omitempty"`
	ID     int    `json:"id,omitempty"`
	Stream string `json:"stream,omitempty"` // stdout, stderr
	Data   []byte `json:"data,omitempty"`
	Pid    int    `json:"pid,omitempty"`
	Exit   *int   `json:"exit,omitempty"` // 128+signal, as in a shell
	Error  string `json:"error,omitempty"`
}

type child struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
}

type streamWriter struct {
	id     int
	stream string
}

func (w streamWriter) Write(p []byte) (int, error) {
	say(event{ID: w.id, Stream: w.stream, Data: p})
	return len(p), nil
}

func agent([]string) error {
	var (
		children sync.Map
		running  sync.WaitGroup
	)
	say(event{Ready: true})
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var r request
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			return err
		}
		if r.Op == "start" {
			c, err := startChild(r)
			if err != nil {
				status := 127
				say(event{ID: r.ID, Exit: &status, Error: err.Error()})
				continue
			}
			children.Store(r.ID, c)
			running.Add(1)
			go func() {
				defer running.Done()
				status := exitStatus(c.cmd.Wait())
				children.Delete(r.ID)
				say(event{ID: r.ID, Exit: &status})
			}()
			continue
		}
		v, ok := children.Load(r.ID)
		if !ok {
			continue
		}
		switch c := v.(*child); r.Op {
		case "stdin":
			c.stdin.Write(r.Data)
		case "eof":
			c.stdin.Close()
		case "signal":
			syscall.Kill(-c.cmd.Process.Pid, syscall.Signal(r.Sig))
		}
	}
	children.Range(func(_, v any) bool {
		syscall.Kill(-v.(*child).cmd.Process.Pid, syscall.SIGKILL)
		return true
	})
	running.Wait()
	return in.Err()
}

func startChild(r request) (*child, error) {
	cmd := exec.Command(r.Argv[0], r.Argv[1:]...)
	cmd.Env = append(os.Environ(), r.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stdout = streamWriter{r.ID, "stdout"}
	cmd.Stderr = streamWriter{r.ID, "stderr"}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	say(event{ID: r.ID, Pid: cmd.Process.Pid})
	return &child{cmd, stdin}, nil
}

func exitStatus(err error) int {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return exit.ExitCode()
}
