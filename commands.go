package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file is the worker's side of commands: work that is queued, handled by one instance at a time, reports its progress, can be
// cancelled, and has one outcome, which is kept.
//
// The record of a command, in the bucket aegis_commands, is the truth; every change of it is a compare-and-swap. The message in
// the work queue AEGIS_COMMANDS carries its data, and wakes a worker up. The server republishes each change of a record to
// whoever follows it.

// A Command is what a handler of [HandleCommand] is called with.
type Command[T any] struct {
	ID       string // what [IdempotencyKey] set, else a random one
	Source   string // the service that sent it, by its own account
	Priority Priority
	Attempt  int      // counts from 1, crashes included
	Fence    uint64   // rises with each attempt: a store that remembers the highest can refuse an instance that was given up
	Last     Progress // what the attempt before this one reported last
	Data     T

	run *run
}

// Progress is the state of a command at a moment.
type Progress struct {
	State   string  // queued, running, retrying; or in the end completed, failed or canceled
	Percent float64 // 0 to 100
	Message string
	Attempt int
	Time    time.Time
}

// The states of a command.
const (
	queued    = "queued"
	running   = "running"
	retrying  = "retrying"
	completed = "completed"
	failed    = "failed"
	canceled  = "canceled"
)

const (
	commandStream = "AEGIS_COMMANDS"
	commandPrefix = "commands."
	recordBucket  = "aegis_commands"
	recordPrefix  = "$KV." + recordBucket + "."
	updatePrefix  = "aegis.jobs." // where changes of records are republished

	resultTTL        = 24 * time.Hour
	progressInterval = 100 * time.Millisecond // between writes of progress
	maxProgress      = 1 << 10                // bytes of its message
	followInterval   = 10 * time.Second       // between looks at a record, in case that a message was lost
)

func (s *Service) commandStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:      commandStream,
		Subjects:  []string{commandPrefix + "*.*", commandPrefix + "*.*.*"},
		Retention: jetstream.WorkQueuePolicy,
		Replicas:  s.cfg.replicas,
	}
}

// recordStream is the bucket, whose changes are republished.
func (s *Service) recordStream() jetstream.StreamConfig {
	config := s.bucket(recordBucket)
	config.AllowMsgTTL = true
	config.RePublish = &jetstream.RePublish{Source: recordPrefix + ">", Destination: updatePrefix + ">"}
	return config
}

// A record is all that is known of a command but its data.
type record struct {
	State    string    `json:"state"`
	Percent  float64   `json:"percent,omitempty"`
	Message  string    `json:"message,omitempty"`
	Attempt  int       `json:"attempt,omitempty"`
	Time     time.Time `json:"time"`
	Priority Priority  `json:"priority,omitempty"`
	Source   string    `json:"source,omitempty"`
	Digest   string    `json:"digest"`             // of the data
	Failures int       `json:"failures,omitempty"` // attempts that failed
	Crashes  int       `json:"crashes,omitempty"`  // attempts that ended without a word
	Owner    string    `json:"owner,omitempty"`    // the instance that may change it
	Wake     uint64    `json:"wake,omitempty"`     // the sequence of the message that it was claimed by
	Nonce    string    `json:"nonce"`              // of this change
	Result   []byte    `json:"result,omitempty"`
	Type     string    `json:"type,omitempty"` // of Result
	Error    *Error    `json:"error,omitempty"`
}

func (r *record) final() bool { return r.State == completed || r.State == failed || r.State == canceled }

func (r *record) progress() Progress {
	return Progress{State: r.State, Percent: r.Percent, Message: r.Message, Attempt: r.Attempt, Time: r.Time}
}

// recordKey is <service>.<command>.<id>, whatever characters the id has.
func recordKey(service, command, id string) string {
	if !isToken(id, maxIDLength) {
		id = "=" + base64.RawURLEncoding.EncodeToString([]byte(id))
	}
	return service + "." + command + "." + id
}

// writeRecord replaces the record of this revision; 0 means that there is none. If the record was changed by another instance, the
// failure is a conflict, and writeRecord returns what the record is now.
func (s *Service) writeRecord(ctx context.Context, key string, rec *record, revision uint64, cfg *callConfig) (now *record, at uint64, failure *Error) {
	rec.Nonce, rec.Time = rand.Text(), time.Now().UTC()
	data, err := MsgPack.Marshal(rec)
	if err != nil {
		return nil, 0, asError(err)
	}
	x := &exchange{subject: recordPrefix + key, data: data}
	if rec.final() {
		x.header = nats.Header{jetstream.MsgTTLHeader: {resultTTL.String()}}
	}
	var value []byte
	_, failure = s.withRetries(ctx, x, cfg, nil, func() (_ *nats.Msg, failure *Error, again bool) {
		value, at, failure = s.compareAndSwap(ctx, x, s.recordStream(), revision)
		return nil, failure, retryable(failure)
	})
	if failure == nil {
		return rec, at, nil
	}
	now, unreadable := parseRecord(key, value)
	return now, at, cmp.Or(unreadable, failure)
}

// readRecord asks the bucket's leader for the latest record, nil if there is none. It uses the connection c if that is not nil.
func (s *Service) readRecord(ctx context.Context, c *conn, key string) (*record, uint64, *Error) {
	data, revision, failure := s.readKey(ctx, c, recordBucket, key)
	if failure != nil {
		return nil, revision, failure
	}
	rec, failure := parseRecord(key, data)
	return rec, revision, failure
}

// parseRecord returns the record in data, nil if that is empty.
func parseRecord(key string, data []byte) (*record, *Error) {
	if len(data) == 0 {
		return nil, nil
	}
	rec := &record{}
	if err := MsgPack.Unmarshal(data, rec); err != nil {
		return nil, newError(ErrInternal, "the record of %s can't be read: %v", key, err)
	}
	return rec, nil
}

// HandleCommand executes a command: fn is called with its data, on a goroutine of the library, up to [Concurrency] at once in
// each instance. command is [A-Za-z][A-Za-z0-9_]*. fn's ctx ends after [Deadline], when the command is cancelled, when another
// instance had to take over, or when Stop's time is up.
//
// What is guaranteed: a command has one outcome, and once it has, fn is not called again. What isn't: that fn is called once.
// After an error it is called again, after a pause ([Backoff]), up to [Attempts] times in all, a crash counting as one; and an
// instance that was given up, since it was paused or cut off, may still be at it for a moment. So let effects elsewhere take
// Command.ID or Command.Fence. After the last attempt the command has failed, and is set aside as a dead letter; data that
// can't be decoded into T fails at once. What Stop cuts short is queued again, and uses up no attempt. The result must fit the
// server's max_payload.
//
// The errors are those of [Subscribe].
func HandleCommand[T, R any](s *Service, command string, fn func(context.Context, *Command[T]) (R, error), opts ...HandlerOption) error {
	if fn == nil {
		return newError(ErrInvalid, "command %q: its function is nil", command)
	}
	return s.handleCommand(command, func(ctx context.Context, m *Message) ([]byte, error) {
		cmd := &Command[T]{}
		r, err := decode(ctx, m, &cmd.Data)
		if err != nil {
			return nil, err
		}
		run := r.run
		cmd.run, cmd.ID, cmd.Source = run, run.id, m.Source
		cmd.Priority, cmd.Attempt, cmd.Fence, cmd.Last = run.priority, run.attempt, run.fence, run.last
		result, err := fn(ctx, cmd)
		if err != nil {
			return nil, err
		}
		data, _, err := marshal(r.codec, &result)
		if err != nil {
			return nil, newError(ErrInternal, "encoding the result of %s: %v", command, err)
		}
		return data, nil
	}, opts)
}

func (s *Service) handleCommand(command string, fn HandlerFunc, opts []HandlerOption) error {
	cfg, failure := s.newHandlerConfig(kindCommand, opts)
	if failure := cmp.Or(checkNames(s.name, kindCommand, command), failure); failure != nil {
		return failure
	}
	e := &endpoint{kind: kindCommand, name: command, subject: commandPrefix + s.name + "." + command, run: fn, reserve: letterRoom}
	var lanes []*lane
	for _, level := range levels {
		suffix := suffixes[level]
		lanes = append(lanes, newLane(s.name+"~"+command+strings.Replace(suffix, ".", "~", 1), e.subject+suffix))
	}
	ex := &executions{feed: newFeed(e, cfg, s.commandStream(), lanes...), owner: rand.Text()}
	ex.inspect = ex.checkAll
	e.source = ex
	return s.addEndpoint(e, cfg)
}

// executions is where an endpoint's commands come from.
type executions struct {
	*feed

	checking atomic.Bool
	owner    string   // its name in records
	runs     sync.Map // string -> *run, by key
}

// A run is one attempt at a command.
type run struct {
	ex       *executions
	key      string
	id       string
	r        *request
	priority Priority // this and the next are claim's
	attempt  int
	fence    uint64
	last     Progress
	claimed  atomic.Bool

	turn     sync.Mutex // guards the next two, also while the record is written: one change after the other
	rec      record
	revision uint64

	mu      sync.Mutex // guards the rest
	pending *Progress  // to be written
	writing bool       // writeProgress runs
	lost    *Error     // why it is this run's no more

	over context.Context // ends when no more reports are taken
	end  context.CancelFunc
}

func (ex *executions) open(ctx context.Context) error {
	if failure := ex.svc.patiently(ctx, func(ctx context.Context) *Error {
		_, failure := ex.svc.openStream(ctx, ex.svc.recordStream(), recordPrefix+">")
		return failure
	}); failure != nil {
		return failure
	}
	ex.svc.probePublish(recordPrefix+recordKey(ex.svc.name, ex.name, "probe"), readSubject(recordBucket))
	return ex.feed.open(ctx)
}

// serve handles one command.
func (ex *executions) serve(m *nats.Msg, arrived time.Time) {
	defer ex.release()
	d, id := ex.delivery(m), m.Header.Get(headerID)
	if d == nil || id == "" {
		ex.svc.log.Warn("dropped a message that is not a command", "endpoint", ex.name, "correlation_id", m.Header.Get(headerCorrelation), "subject", m.Subject)
		ex.acknowledge(m, ackTerminate)
		return
	}
	x := &run{ex: ex, key: recordKey(ex.svc.name, ex.name, id), id: id}
	x.over, x.end = context.WithCancel(context.Background())
	d.id = id
	x.r = ex.newRequest(m, d, arrived)
	x.r.run = x
	if ex.svc.draining.Load() || !ex.admit(x.r) {
		ex.giveBack(m)
		return
	}
	if _, busy := ex.runs.LoadOrStore(x.key, x); busy { // delivered again since the server didn't hear that it runs
		return
	}
	defer ex.runs.Delete(x.key)
	notice := commandPrefix + x.key
	ex.svc.cancels.add(notice, func() { ex.helpers.Go(func() { x.check() }) })
	defer ex.svc.cancels.remove(notice)
	if x.claim() {
		ex.dispatch(x.r)
	}
}

// claim makes the command this run's. Otherwise it has seen to the message.
func (x *run) claim() bool {
	ex := x.ex
	x.turn.Lock()
	defer x.turn.Unlock()
	ctx, cancel := context.WithTimeout(ex.svc.base, 5*time.Second)
	defer cancel()
	rec, revision, failure := ex.svc.readRecord(ctx, nil, x.key)
	for failure == nil || failure.Code == conflict.Code {
		sequence := x.r.delivery.sequence
		if rec == nil || rec.final() || rec.Wake != 0 && rec.Wake != sequence && rec.State != queued { // woken up twice: another message stands for it
			ex.acknowledge(x.r.in, ack)
			return false
		}
		x.rec, x.revision = *rec, revision
		if rec.State == running && rec.Owner == ex.owner { // claimed just now, but the confirmation was lost
			x.rec.Attempt--
		} else if rec.State == running { // by one that is no more, or was given up
			x.rec.Crashes++
		}
		if x.rec.Failures+x.rec.Crashes >= ex.cfg.attempts {
			last := x.rec.Error
			if last == nil {
				last = newError(ErrInternal, "its handler began %d times and never finished: it crashed or hung, or its instance lost the connection", x.rec.Crashes)
				last.Source = ex.svc.name
				ex.meter.ended(x.r.msg.Source, last)
			}
			x.fail(last)
			return false
		}
		x.last = rec.progress()
		x.rec.State, x.rec.Owner, x.rec.Wake = running, ex.owner, sequence
		x.rec.Attempt++
		rec, revision, failure = ex.svc.writeRecord(ctx, x.key, &x.rec, revision, callConfigs[kindCommand])
		if failure == nil {
			x.revision, x.fence, x.attempt, x.priority = revision, revision, x.rec.Attempt, x.rec.Priority
			x.claimed.Store(true)
			return true
		}
	}
	ex.logger(x.r).Warn("a command can't be claimed", "error", failure)
	ex.acknowledge(x.r.in, nakAfter(backoff(x.r.delivery.attempt, fetchTick, 5*time.Second)))
	return false
}

// write changes the record. If it is this run's no more, it ends the handler's ctx.
func (x *run) write(ctx context.Context) *Error {
	x.mu.Lock()
	p := x.pending
	if p != nil {
		x.rec.Percent, x.rec.Message, x.pending = p.Percent, p.Message, nil
	}
	x.mu.Unlock()
	cfg := *callConfigs[kindCommand]
	cfg.sticky = true
	for {
		now, revision, failure := x.ex.svc.writeRecord(ctx, x.key, &x.rec, x.revision, &cfg)
		switch {
		case failure == nil:
			x.revision = revision
			return nil
		case failure.Code != conflict.Code:
			x.mu.Lock()
			if x.pending == nil {
				x.pending = p
			}
			x.mu.Unlock()
			return failure
		case now == nil || now.Owner != x.ex.owner || now.State == canceled:
			return x.lose(now)
		}
		x.revision = revision // the confirmation of an earlier write was lost
	}
}

// lose notes who the command belongs to now.
func (x *run) lose(now *record) *Error {
	lost := newError(ErrFenced, "another instance has taken over the command %s", x.id)
	if now != nil && now.State == canceled {
		lost = newError(ErrCanceled, "the command %s was cancelled", x.id)
	}
	x.mu.Lock()
	x.lost = lost
	x.mu.Unlock()
	x.r.abort()
	return lost
}

// whyLost is nil as long as the command is this run's.
func (x *run) whyLost() *Error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.lost
}

// checkAll looks after all runs, in case that the notice of a cancellation was lost.
func (ex *executions) checkAll() {
	if !ex.checking.CompareAndSwap(false, true) {
		return
	}
	ex.helpers.Go(func() {
		defer ex.checking.Store(false)
		ex.runs.Range(func(_, x any) bool { return x.(*run).check() })
	})
}

// check looks whether the command is still this run's; not ok if that can't be told.
func (x *run) check() bool {
	ctx, cancel := context.WithTimeout(x.ex.svc.base, 5*time.Second)
	defer cancel()
	claimed := x.claimed.Load() // before it is read
	now, _, failure := x.ex.svc.readRecord(ctx, nil, x.key)
	if failure == nil && now != nil && (now.State == canceled || claimed && now.Owner != x.ex.owner) {
		x.lose(now)
	}
	return failure == nil
}

// Progress reports how far the command is, to those who follow it and, after a crash, to the next attempt. percent is 0 to 100.
// It doesn't block; message is cut after 1,024 bytes; reports that follow each other within 0.1 s are combined into the last.
// The error tells that going on is of no use: [ErrCanceled] if the command was cancelled, [ErrFenced] if another instance has
// taken over; or [ErrInvalid] for another percent.
func (c *Command[T]) Progress(percent float64, message string) error {
	if !(percent >= 0 && percent <= 100) {
		return newError(ErrInvalid, "Progress(%v): want 0 to 100", percent)
	}
	message = message[:min(len(message), maxProgress)]
	if c.run == nil {
		return newError(ErrInvalid, "Progress: the command is not from HandleCommand")
	}
	return c.run.report(Progress{Percent: percent, Message: message}).orNil()
}

func (x *run) report(p Progress) *Error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.lost != nil {
		return x.lost
	}
	if x.over.Err() != nil {
		return newError(ErrInvalid, "Progress: the handler has returned")
	}
	x.pending = &p
	if !x.writing {
		x.writing = true
		x.ex.helpers.Go(x.writeProgress)
	}
	return nil
}

// writeProgress writes what is pending, with pauses, until there is nothing or the handler has returned: then the last write
// takes it along.
func (x *run) writeProgress() {
	for {
		x.mu.Lock()
		if x.pending == nil || x.lost != nil || x.over.Err() != nil {
			x.writing = false
			x.mu.Unlock()
			return
		}
		x.mu.Unlock()
		ctx, cancel := context.WithTimeout(x.ex.svc.base, 5*time.Second)
		x.turn.Lock()
		if failure := x.write(ctx); failure != nil {
			x.ex.logger(x.r).Warn("progress was not written", "error", failure)
		}
		x.turn.Unlock()
		cancel()
		sleep(x.over, progressInterval)
	}
}

// done writes the outcome, or what is next.
func (ex *executions) done(r *request, data []byte, failure *Error) { r.run.finish(data, failure) }

func (x *run) finish(data []byte, failure *Error) {
	x.end()
	x.turn.Lock()
	defer x.turn.Unlock()
	svc, r, lost := x.ex.svc, x.r, x.whyLost()
	givenBack := svc.base.Err() != nil || r.fenced
	if failure != nil {
		failure = failure.cut()
		failure.Source = svc.name
	}
	switch {
	case lost != nil:
		x.yieldTo(lost)
	case failure == nil:
		codec := cmp.Or(r.codec, svc.cfg.codec) // middleware may have answered
		x.rec.State, x.rec.Result, x.rec.Type, x.rec.Error = completed, data, codec.ContentType(), nil
		x.conclude(ack)
	case givenBack:
		x.giveBack()
	default:
		x.rec.Error = failure
		if x.rec.Failures++; r.permanent || x.rec.Failures+x.rec.Crashes >= x.ex.cfg.attempts {
			x.fail(failure)
			return
		}
		x.rec.State = retrying
		pause := backoff(x.rec.Failures, x.ex.cfg.backoff, x.ex.cfg.maxPause)
		x.ex.logger(r).Warn("an attempt failed", "error", failure, "attempt", x.rec.Attempt, "pause", pause)
		x.conclude(nakAfter(pause))
	}
}

// conclude writes the record and, if the command still belongs to this run, acknowledges the message.
func (x *run) conclude(how string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if failure := x.write(ctx); failure != nil {
		x.yieldTo(failure)
		return
	}
	x.ex.acknowledge(x.r.in, how)
}

// yieldTo leaves the message to the instance that has the command now. If the command was cancelled, it acknowledges the message.
func (x *run) yieldTo(failure *Error) {
	if failure.Code == ErrCanceled.Code {
		x.ex.acknowledge(x.r.in, ack)
		return
	}
	x.ex.logger(x.r).Warn("the outcome of a command was not stored", "error", failure)
}

// fail makes the command failed. It stores the dead letter first and the outcome afterwards; after a crash in between, both are done
// again.
func (x *run) fail(failure *Error) {
	if !x.ex.storeDeadLetter(x.r, failure, x.rec.Failures+x.rec.Crashes) {
		x.giveBack()
		return
	}
	x.rec.State, x.rec.Error = failed, failure
	x.conclude(ack)
}

// giveBack queues the command again, as if this attempt had not been made.
func (x *run) giveBack() {
	x.ex.svc.returning.Add(1)
	defer x.ex.svc.returning.Add(-1)
	x.rec.State = queued
	if x.attempt > 0 {
		x.rec.Attempt--
	}
	ctx, cancel := context.WithTimeout(context.Background(), returnTimeout)
	defer cancel()
	if failure := x.write(ctx); failure != nil {
		x.yieldTo(failure)
		return
	}
	x.ex.feed.giveBack(x.r.in)
}

// redriveCommand queues a command again that has failed.
func (s *Service) redriveCommand(ctx context.Context, d DeadLetter) *Error {
	tokens := strings.Split(d.Subject, ".")
	id := d.Header.Get(headerID)
	if len(tokens) < 3 || id == "" {
		return notRun(newError(ErrInvalid, "Redrive: %s with id %q is no command", d.Subject, id))
	}
	key := recordKey(tokens[1], tokens[2], id)
	rec, revision, failure := s.readRecord(ctx, nil, key)
	if failure != nil {
		return failure
	}
	next := record{State: queued, Digest: digest(d.Header, d.Data), Source: d.Header.Get(headerSource)}
	if rec != nil {
		next.Priority, next.Attempt = rec.Priority, rec.Attempt
	}
	switch {
	case rec != nil && rec.State == queued && rec.Digest == next.Digest: // by a Redrive that may not have come further
	case rec != nil && rec.State != failed:
		return notRun(newError(ErrInvalid, "Redrive: the command %s is %s: only one that failed is queued again", id, rec.State))
	default:
		if _, revision, failure = s.writeRecord(ctx, key, &next, revision, callConfigs[kindCommand]); failure != nil && failure.Code == conflict.Code {
			return notRun(newError(ErrUnavailable, "Redrive: the command %s was changed by someone else just now: try again", id))
		} else if failure != nil {
			return failure
		}
	}
	return s.queueCommand(ctx, d.Subject, key, revision, copyHeader(d.Header), d.Data, nil, callConfigs[kindCommand])
}
