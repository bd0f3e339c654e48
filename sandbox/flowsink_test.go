package sandbox

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/internal/flowlog"
)

// sinkOn returns a sink that writes to l and asks l as it would ask a monitor; ask may change the
// answer.
func sinkOn(t *testing.T, l *flowlog.FlowFile, ask func(func())) *flowlog.FlowSink {
	t.Helper()
	f, err := l.Dup()
	testutil.Must(t, err)
	s := flowlog.NewFlowSink(f, time.Now, slog.New(slog.DiscardHandler))
	s.Max = l.MaxSize
	answer := func() {
		if l.Rotate() == nil {
			if f, err := l.Dup(); err == nil {
				s.Hand(f)
				return
			}
		}
		s.Hand(nil)
	}
	s.Want = func() { ask(answer) }
	t.Cleanup(func() { s.Out.(*os.File).Close() })
	return s
}

// records counts the lines of all files of a log, which must be those that were written, and
// returns the size of the largest file.
func records(t *testing.T, name string) (seen map[string]int, largest int64) {
	t.Helper()
	seen = make(map[string]int)
	files, err := filepath.Glob(name + "*")
	testutil.Must(t, err)
	for _, f := range files {
		b, err := os.ReadFile(f)
		testutil.Must(t, err)
		largest = max(largest, int64(len(b)))
		for line := range strings.Lines(string(b)) {
			var n, size int
			if _, err := fmt.Sscanf(line, "record %d of %d ", &n, &size); err != nil || len(line) != size+1 {
				t.Fatalf("%s has %q, which is no whole record", f, line)
			}
			seen[line]++
		}
	}
	return seen, largest
}

func testRecord(n, size int) []byte {
	line := fmt.Appendf(nil, "record %d of %d ", n, size)
	return append(line, bytes.Repeat([]byte{'x'}, size-len(line))...)
}

func TestNoRecordIsLostOrCutWhenTheFileChanges(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	l, said := openTestLog(t, name, flowlog.MinFlowLogSize, 1000)
	s := sinkOn(t, l, func(answer func()) { go answer() })
	const n = 3000
	for i := range n {
		s.Add(testRecord(i, 100+i%900))
		switch {
		case i%7 == 0:
			s.Flush()
		case i%100 == 50:
			s.Settle()
		}
	}
	s.Settle()
	seen, largest := records(t, name)
	if len(seen) != n || s.Written.Load() != n || s.Unwritten.Load() != 0 || s.Unrotated.Load() != 0 || s.Files.Load() < 100 || len(warnings(said)) != 0 {
		t.Errorf("%d records in the files, %d written, %d not, %d files, %d not rotated; %q",
			len(seen), s.Written.Load(), s.Unwritten.Load(), s.Files.Load(), s.Unrotated.Load(), warnings(said))
	}
	if largest > flowlog.MinFlowLogSize {
		t.Errorf("the largest file has %d bytes, want at most %d", largest, flowlog.MinFlowLogSize)
	}
}

func TestARecordLongerThanAFileHasOneOfItsOwn(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	l, _ := openTestLog(t, name, flowlog.MinFlowLogSize, 10)
	s := sinkOn(t, l, func(answer func()) { answer() })
	for i := range 4 {
		s.Add(testRecord(i, 100+i%2*2*flowlog.MinFlowLogSize))
	}
	s.Settle()
	if seen, largest := records(t, name); len(seen) != 4 || largest > 2*flowlog.MinFlowLogSize+101+101 {
		t.Errorf("%d records, the largest file has %d bytes", len(seen), largest)
	}
}

func TestWithoutANextFileTheOldOneIsWrittenOn(t *testing.T) {
	for _, row := range []struct {
		name string
		ask  func(s **flowlog.FlowSink) func(func())
	}{
		{"refused", func(s **flowlog.FlowSink) func(func()) { return func(func()) { (*s).Hand(nil) } }},
		{"no answer", func(s **flowlog.FlowSink) func(func()) { return func(func()) {} }},
	} {
		t.Run(row.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "flows")
			l, _ := openTestLog(t, name, flowlog.MinFlowLogSize, 3)
			var s *flowlog.FlowSink
			s = sinkOn(t, l, row.ask(&s))
			now := time.Now()
			s.Now = func() time.Time { return now }
			for i := range 100 {
				s.Add(testRecord(i, 500))
			}
			s.Settle()
			if seen, _ := records(t, name); len(seen) != 100 || s.Unrotated.Load() != 1 || s.Unwritten.Load() != 0 {
				t.Fatalf("%d records, %d times unrotated, %d unwritten", len(seen), s.Unrotated.Load(), s.Unwritten.Load())
			}
			now = now.Add(flowlog.SinkRetry + 1)
			s.Want = func() {
				testutil.Must(t, l.Rotate())
				f, err := l.Dup()
				testutil.Must(t, err)
				s.Hand(f)
			}
			s.Add(testRecord(100, 500))
			s.Settle()
			if seen, _ := records(t, name); len(seen) != 101 || s.Files.Load() != 1 {
				t.Errorf("%d records, %d files: it does not ask again", len(seen), s.Files.Load())
			}
		})
	}
}

// shortDisk takes a number of bytes, and then none until it is given more room.
type shortDisk struct {
	bytes.Buffer
	room int
}

func (d *shortDisk) Write(b []byte) (int, error) {
	n := min(len(b), d.room)
	d.room -= n
	d.Buffer.Write(b[:n])
	if n < len(b) {
		return n, unix.ENOSPC
	}
	return n, nil
}

func TestARecordThatWasCutIsCompletedFirst(t *testing.T) {
	disk := &shortDisk{room: 250}
	s := flowlog.NewFlowSink(disk, time.Now, slog.New(slog.DiscardHandler))
	for i := range 5 {
		s.Add(testRecord(i, 99)) // two whole ones, half of a third; two are lost
	}
	s.Flush()
	disk.room = 10
	s.Add(testRecord(5, 99)) // and this
	s.Flush()
	s.Flush()
	disk.room = 1000
	s.Add(testRecord(6, 99))
	s.Flush()
	var got []string
	for line := range strings.Lines(disk.String()) {
		got = append(got, strings.Fields(line)[1])
		if len(line) != 100 {
			t.Errorf("%q is no whole record", line)
		}
	}
	if strings.Join(got, " ") != "0 1 2 6" || s.Written.Load() != 4 || s.Unwritten.Load() != 3 || len(s.Buf) != 0 {
		t.Errorf("records %v, %d written, %d not, %d bytes kept", got, s.Written.Load(), s.Unwritten.Load(), len(s.Buf))
	}
}

// TestFlowLogTakesNoMoreThanItsBounds: until the next file exists, records wait in the buffer and
// then in the queue; those that find no room are counted.
func TestFlowLogTakesNoMoreThanItsBounds(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	file, _ := openTestLog(t, name, 64<<10, 1000)
	f, err := file.Dup()
	testutil.Must(t, err)
	l := flowlog.NewFlowLog(f, time.Now, slog.New(slog.DiscardHandler))
	asked := make(chan func(), 100)
	s := l.Sink
	s.Max, s.Want = file.MaxSize, func() {
		select {
		case asked <- func() {
			testutil.Must(t, file.Rotate())
			f, err := file.Dup()
			testutil.Must(t, err)
			s.Hand(f)
		}:
		default:
		}
	}
	go l.Run()
	const n = 20000
	for i := range n {
		l.OnEvent(destroy(uint64(i)))
	}
	lost := l.Lost.Load()
	stop := make(chan struct{})
	answering := make(chan struct{})
	go func() {
		defer close(answering)
		for {
			select {
			case answer := <-asked:
				answer()
			case <-stop:
				return
			}
		}
	}()
	l.Close()
	close(stop)
	<-answering
	if lost == 0 || s.Unwritten.Load() != 0 || s.Written.Load()+l.Lost.Load() != n {
		t.Errorf("%d lost, %d written, %d unwritten of %d", l.Lost.Load(), s.Written.Load(), s.Unwritten.Load(), n)
	}
}

func TestAPipeThatNobodyReadsDoesNotKeepTheWorker(t *testing.T) {
	fds := make([]int, 2)
	testutil.Must(t, unix.Pipe2(fds, unix.O_CLOEXEC|unix.O_NONBLOCK))
	defer unix.Close(fds[0])
	out := os.NewFile(uintptr(fds[1]), "pipe")
	defer out.Close()
	l := flowlog.NewFlowLog(out, time.Now, slog.New(slog.DiscardHandler))
	go l.Run()
	const n = 2000
	for i := range n {
		l.OnEvent(destroy(uint64(i)))
	}
	began := time.Now()
	l.Close()
	if took := time.Since(began); took > flowlog.SinkPatience+20*time.Second || l.Sink.Unwritten.Load() == 0 || l.Sink.Written.Load()+l.Sink.Unwritten.Load()+l.Lost.Load() != n {
		t.Errorf("closed after %s; %+v", took, l.Stats())
	}
}
