package aegis

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has dead letters: the events and commands that could not be handled, which are stored whole, listed, and redriven.

const (
	deadStream   = "AEGIS_DEAD"
	letterPrefix = "aegis.dead." // followed by <kind>.<consumer>

	letterRoom = 2 << 10 // bytes of max_payload that every message leaves free, for what a dead letter adds
	maxReason  = 512     // bytes
)

// A DeadLetter is an event or a command that could not be handled, as [Service.DeadLetters] yields it.
type DeadLetter struct {
	Subject, Consumer, Reason string      // the original subject, the consumer that failed to handle it, and the last error
	Attempts                  int         // how many attempts there were
	Time                      time.Time   // when the dead letter was stored, by the server's clock
	Header                    nats.Header // the headers of the message, and Aegis-Id, Aegis-Subject and Aegis-Time
	Data                      []byte      // the payload; nil if it was too large to be copied: Reason says where it is stored
	Sequence                  uint64      // the dead letter's number in the stream AEGIS_DEAD

	codec Codec // of the service that has listed it
}

// Decode decodes Data into the value that v points to. Its rules and errors are those of [Raw.Decode].
func (d DeadLetter) Decode(v any) error {
	return Raw{d.Data, codecFor(d.Header, d.Data, cmp.Or(d.codec, MsgPack))}.Decode(v)
}

func (s *Service) deadStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{Name: deadStream, Subjects: []string{letterPrefix + ">"}, Replicas: s.cfg.replicas}
}

// DeadLetters yields the dead letters of all services that are stored when it begins, the oldest first. It reads them one by one.
// Each read blocks until ctx ends at most, or for [WithTimeout] if ctx has no deadline. If a read fails, DeadLetters yields the
// error and ends. The loop may redrive or discard the dead letters. The server keeps a dead letter until then: [WithRetention]
// does not limit AEGIS_DEAD.
//
// To find the dead letters of one handler, compare Consumer. For a subscription, Consumer is the name of the service, a tilde,
// and the name of [Durable], or else the pattern with ~ for each dot, + for * and # for >. For example, it is risk~payment~+
// for the pattern payment.* of the service risk. For a command, Consumer is the name of the service, a tilde, the name of the
// command, and ~critical, ~high or ~low unless the priority is Normal.
//
// Errors:
//   - [ErrUnavailable] if there is no connection or no JetStream
//   - [ErrTimeout] or [ErrCanceled] if ctx ends, or [ErrTimeout] if JetStream does not answer
//   - [ErrOverloaded] if the server's max_subscriptions is reached
//   - [ErrClosed] after Stop
//   - [ErrDenied] if the server's permissions do not allow it
func (s *Service) DeadLetters(ctx context.Context) iter.Seq2[DeadLetter, error] {
	return stored(ctx, s, deadStream, letterPrefix+">", s.letterOf)
}

// letterOf returns the dead letter in a stored message, and true.
func (s *Service) letterOf(m *jetstream.RawStreamMsg) (DeadLetter, bool) {
	d := DeadLetter{Time: m.Time, Header: copyHeader(m.Header), Data: m.Data, Sequence: m.Sequence, codec: s.cfg.codec}
	d.Subject, d.Consumer, d.Reason = m.Header.Get(headerSubject), m.Header.Get(headerConsumer), m.Header.Get(headerReason)
	d.Attempts, _ = strconv.Atoi(m.Header.Get(headerAttempts))
	for _, key := range []string{headerConsumer, headerReason, headerAttempts, headerAttempt} {
		delete(d.Header, key)
	}
	return d, true
}

// Redrive sends the event or the command of a dead letter again to the consumer that failed to handle it, and to no other one,
// and then removes the dead letter. The message has all its [Attempts] again. An event keeps its id, time and subject, and has a
// new Sequence. A command is queued again, and its new outcome replaces the old one. The caller may change d.Header and d.Data
// before; the idempotency key of a command still belongs to the data that was sent first. Command.Attempt continues to count.
// Redrive blocks until ctx ends at most, or for several times [WithTimeout] if ctx has no deadline. A Redrive that has failed can
// be repeated.
//
// Errors:
//   - [ErrNotFound] if the dead letter was redriven or discarded already, or if its consumer no longer exists
//   - [ErrInvalid] if d is not from [Service.DeadLetters], if the command has not failed, or if the consumer does not take
//     redriven events
//   - [ErrUnavailable] if another process has just changed the command
//   - those of [Publish]
func (s *Service) Redrive(ctx context.Context, d DeadLetter) error {
	failure := s.checkLetter(ctx, "Redrive", d)
	switch {
	case failure != nil:
	case strings.HasPrefix(d.Subject, commandPrefix):
		failure = s.redriveCommand(ctx, d)
	default:
		failure = s.redriveEvent(ctx, d)
	}
	if failure != nil {
		return failure
	}
	if failure = s.removeLetter(ctx, d, "it was redriven, but removing "); failure != nil && failure.Code != ErrNotFound.Code {
		return failure
	}
	return nil
}

// Discard removes a dead letter for good. The subscription or the command handler that it came from need not exist. Discard
// blocks until ctx ends at most, or for several times [WithTimeout] if ctx has no deadline.
//
// Errors:
//   - [ErrNotFound] if the dead letter was redriven or discarded already
//   - [ErrInvalid] if d is not from [Service.DeadLetters]
//   - those of [Service.DeadLetters]
func (s *Service) Discard(ctx context.Context, d DeadLetter) error {
	failure := s.checkLetter(ctx, "Discard", d)
	if failure == nil {
		failure = s.removeLetter(ctx, d, "removing ")
	}
	return failure.orNil()
}

// checkLetter returns an error if the dead letter d does not exist.
func (s *Service) checkLetter(ctx context.Context, verb string, d DeadLetter) *Error {
	if d.Sequence == 0 || d.Consumer == "" {
		return notRun(newError(ErrInvalid, "%s: sequence %d with consumer %q is not from DeadLetters", verb, d.Sequence, d.Consumer))
	}
	var m *jetstream.RawStreamMsg
	failure := s.askStream(ctx, deadStream, d.name(), func(ctx context.Context, dead jetstream.Stream) (err error) {
		m, err = dead.GetMsg(ctx, d.Sequence)
		return err
	})
	if failure == nil && !m.Time.Equal(d.Time) {
		failure = notRun(newError(ErrNotFound, "%s of %v does not exist any more: another one has its sequence now", d.name(), d.Time))
	}
	return failure
}

// removeLetter removes the dead letter d. In the text of an error, doing comes before its name.
func (s *Service) removeLetter(ctx context.Context, d DeadLetter, doing string) *Error {
	return s.askStream(ctx, deadStream, doing+d.name(), func(ctx context.Context, dead jetstream.Stream) error {
		return dead.DeleteMsg(ctx, d.Sequence)
	})
}

func (d DeadLetter) name() string { return "the dead letter " + strconv.FormatUint(d.Sequence, 10) }

// redriveEvent stores the event of a dead letter again, for the consumer that failed to handle it. The message id keeps a Redrive
// that is repeated within the stream's duplicate window from storing the event twice.
func (s *Service) redriveEvent(ctx context.Context, d DeadLetter) *Error {
	var consumer jetstream.Consumer
	what := "the consumer " + d.Consumer + " of " + eventStream
	failure := s.askJetStream(ctx, what, func(ctx context.Context, js jetstream.JetStream) (err error) {
		consumer, err = js.Consumer(ctx, eventStream, d.Consumer)
		return err
	})
	if failure != nil {
		return failure
	}
	// The subject is its own, so that a limit of messages per subject evicts no other redriven event.
	subject := fmt.Sprintf("%s%s.%d", redrivePrefix, d.Consumer, d.Sequence)
	have := consumer.CachedInfo().Config
	if !slices.ContainsFunc(append(have.FilterSubjects, have.FilterSubject), func(p string) bool { return covers(p, subject) }) {
		return notRun(newError(ErrInvalid, "%s does not take %s: add that to its filter and to the stream's subjects", what, subject))
	}
	x := &exchange{subject: subject, header: copyHeader(d.Header), data: d.Data}
	x.header[headerSubject] = []string{d.Subject}
	x.header[jetstream.MsgIDHeader] = []string{fmt.Sprintf("redrive-%d-%s", d.Sequence, strconv.FormatInt(d.Time.UnixNano(), 36))}
	return s.storeWithRetries(ctx, x, s.eventStream(), callConfigs[kindEvent])
}

// storeDeadLetter stores the message of r as a dead letter. It retries until that succeeds. It reports false if Stop's time is up
// before that. The message id keeps a retry from storing the dead letter twice.
func (f *feed) storeDeadLetter(r *request, reason *Error, attempts int) bool {
	d := r.delivery
	text := strings.Map(func(char rune) rune { return max(char, ' ') }, cutText(reason.Error(), maxReason))
	added := nats.Header{
		headerSubject:         {r.msg.Subject},
		headerID:              {r.id},
		headerTime:            {d.time.Format(time.RFC3339Nano)},
		headerConsumer:        {d.consumer},
		headerReason:          {text},
		headerAttempts:        {strconv.Itoa(attempts)},
		jetstream.MsgIDHeader: {fmt.Sprintf("%s-%d-%s", d.consumer, d.sequence, strconv.FormatInt(d.time.UnixNano(), 36))},
	}
	x := exchange{subject: f.letters(), header: copyHeader(r.in.Header), data: r.in.Data}
	maps.Copy(x.header, added)
	if messageSize(x.header, x.data)+64 > f.svc.maxPayload() { // not from Publish or SendCommand, which leave room
		x.header, x.data = added, nil
		added[headerReason] = []string{fmt.Sprintf("(too large to be copied, see sequence %d of %s) %s",
			d.sequence, f.stream.Name, text)}
	}
	ctx := context.Background() // so that Stop does not cut short what may have been sent
	for n := 1; ; n++ {         // meanwhile keepAlive keeps the message with this instance
		_, failure := f.svc.store(ctx, x.within(ctx, 5*time.Second), f.svc.deadStream())
		if failure == nil {
			break
		}
		f.logger(r).Error("a dead letter can't be stored", "error", failure)
		if !sleep(f.svc.base, backoff(n, retryPause, 5*time.Second)) {
			return false
		}
	}
	f.meter.dead.Add(1)
	f.logger(r).Error("stored a dead letter", "error", reason, "attempts", attempts)
	return true
}

// letters returns the subject of the feed's dead letters.
func (f *feed) letters() string { return letterPrefix + f.kind + "." + f.lanes[0].config.Durable }

// copyHeader returns a copy of h without the headers that the server acts on and those that nats.go refuses to send.
func copyHeader(h nats.Header) nats.Header {
	out := make(nats.Header, len(h)+8)
	maps.Copy(out, h)
	maps.DeleteFunc(out, func(key string, _ []string) bool {
		return key == "" || strings.HasPrefix(key, "Nats-") ||
			strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r) })
	})
	return out
}
