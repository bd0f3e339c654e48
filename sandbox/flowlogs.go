package sandbox

// The flow log between monitor and worker: the monitor opens the files, the worker asks for the
// next.

import (
	"fmt"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/process"
)

// nextFlowLog answers a worker whose file is full. The link's reader calls it, so it must not
// block.
func (m *monitor) nextFlowLog(l *process.WorkerLink) {
	if m.flowLog == nil || l.LogWants.Add(1) > 1 {
		return // the goroutine that handles the previous request handles this one, too
	}
	// Ends after a few renames; FlowFile.close waits for that.
	go func() {
		for seen := int64(1); seen > 0; seen = l.LogWants.Add(-seen) {
			seen = l.LogWants.Load()
			m.giveFlowLog(l)
		}
	}()
}

// giveFlowLog hands the next file to a worker, or tells it that there is none.
func (m *monitor) giveFlowLog(l *process.WorkerLink) {
	if m.flowLog.Rotate() == nil {
		if f, err := m.flowLog.Dup(); err == nil {
			defer f.Close()
			_ = l.Post(channel.MsgFlowLog, nil, channel.FDOf(f))
			return
		}
	}
	_ = l.Post(channel.MsgFlowLog, nil) // it keeps writing
}

// reopenFlowLog makes the flow log continue in the file that is now at its path. When it returns,
// the worker has at most one write to the old file under way.
func (m control) reopenFlowLog() (any, error) {
	m.change.Lock()
	defer m.change.Unlock()
	if m.flowLog == nil || m.flowLog.Path == "" {
		return nil, &api.Error{Code: api.CodeInvalid, Message: "there is no flow log in a file of its own name, and so nothing to open again"}
	}
	if err := m.flowLog.Reopen(); err != nil {
		return nil, fmt.Errorf("open the flow log again: %w: it is written on as it was", err)
	}
	f, err := m.flowLog.Dup()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := m.tell(channel.MsgFlowLog, nil, channel.FDOf(f)); err != nil {
		return nil, fmt.Errorf("pass the flow log on: %w", err)
	}
	m.log.Infof("monitor", "the flow log was opened again")
	return api.FlowLogResult{File: m.flowLog.Path}, nil
}
