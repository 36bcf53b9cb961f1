package aegis

import (
	"context"
	"errors"
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

// This file has the dead letters: events and commands that could not be handled are stored whole, listed, and redriven.

const (
	deadStream   = "AEGIS_DEAD"
	letterPrefix = "aegis.dead." // a kind and a consumer follow

	headerConsumer = "Aegis-Consumer" // these three are of dead letters only
	headerReason   = "Aegis-Reason"
	headerAttempts = "Aegis-Attempts"
	letterRoom     = 2 << 10 // bytes that a dead letter may have besides its event
	maxReason      = 512     // bytes
)

// A DeadLetter is a message that could not be handled, whole.
type DeadLetter struct {
	Subject, Consumer, Reason string // the full subject; who failed it; the last error
	Attempts                  int
	Time                      time.Time // when it was set aside
	Header                    nats.Header
	Data                      []byte
	Sequence                  uint64 // its number among the dead letters
}

func (s *Service) deadStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{Name: deadStream, Subjects: []string{letterPrefix + ">"}, Replicas: s.cfg.replicas}
}

// DeadLetters yields the dead letters of all services that there are now, oldest first. It asks the server for one at a time, each
// until ctx ends, or for [WithTimeout] if ctx has no deadline. If one can't be read, it yields an error and ends.
func (s *Service) DeadLetters(ctx context.Context) iter.Seq2[DeadLetter, error] {
	return func(yield func(DeadLetter, error) bool) {
		var stream jetstream.Stream
		for next := uint64(1); ; next++ {
			var m *jetstream.RawStreamMsg
			failure := s.askJetStream(ctx, "the stream "+deadStream, func(ctx context.Context, js jetstream.JetStream) (err error) {
				if stream == nil {
					stream, err = js.Stream(ctx, deadStream)
				}
				if err == nil {
					m, err = stream.GetMsg(ctx, next, jetstream.WithGetMsgSubject(letterPrefix+">"))
				}
				if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrMsgNotFound) {
					return nil
				}
				return err
			})
			switch {
			case failure != nil:
				yield(DeadLetter{}, failure)
				return
			case m == nil || m.Sequence > stream.CachedInfo().State.LastSeq || !yield(letterOf(m), nil):
				return
			}
			next = m.Sequence
		}
	}
}

func letterOf(m *jetstream.RawStreamMsg) DeadLetter {
	d := DeadLetter{
		Subject:  m.Header.Get(headerSubject),
		Consumer: m.Header.Get(headerConsumer),
		Reason:   m.Header.Get(headerReason),
		Time:     m.Time,
		Header:   copyHeader(m.Header),
		Data:     m.Data,
		Sequence: m.Sequence,
	}
	d.Attempts, _ = strconv.Atoi(m.Header.Get(headerAttempts))
	for _, key := range []string{headerConsumer, headerReason, headerAttempts} {
		delete(d.Header, key)
	}
	return d
}

// Redrive has a dead letter handled again, with fresh attempts, by the consumer that failed it and no one else, and removes it. Its
// Header and Data may have been mended. The event keeps its id, time and subject; its Sequence is new.
//
// Errors: [ErrNotFound] if the letter was redriven already or its consumer is no more, [ErrInvalid] if d is not from
// [Service.DeadLetters], and those of [Publish].
func (s *Service) Redrive(ctx context.Context, d DeadLetter) error {
	if d.Sequence == 0 || d.Consumer == "" {
		return notRun(newError(ErrInvalid, "Redrive: sequence %d, consumer %q: not a dead letter of DeadLetters", d.Sequence, d.Consumer))
	}
	var m *jetstream.RawStreamMsg
	failure := s.askJetStream(ctx, fmt.Sprintf("dead letter %d", d.Sequence), func(ctx context.Context, js jetstream.JetStream) error {
		dead, err := js.Stream(ctx, deadStream)
		if err == nil {
			m, err = dead.GetMsg(ctx, d.Sequence)
		}
		return err
	})
	switch {
	case failure != nil:
		return failure
	case !m.Time.Equal(d.Time):
		return notRun(newError(ErrNotFound, "dead letter %d of %v is no more: there is another one in its place", d.Sequence, d.Time))
	case strings.HasPrefix(d.Subject, commandPrefix):
		failure = s.redriveCommand(ctx, d)
	default:
		failure = s.redriveEvent(ctx, d)
	}
	if failure != nil {
		return failure
	}
	what := fmt.Sprintf("it was redriven, but removing the dead letter %d", d.Sequence)
	return s.askJetStream(ctx, what, func(ctx context.Context, js jetstream.JetStream) error {
		dead, err := js.Stream(ctx, deadStream)
		if err == nil {
			err = dead.DeleteMsg(ctx, d.Sequence)
		}
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil
		}
		return err
	}).orNil()
}

// redriveEvent stores the event of a dead letter for the consumer that failed it.
func (s *Service) redriveEvent(ctx context.Context, d DeadLetter) *Error {
	var consumer jetstream.Consumer
	failure := s.askJetStream(ctx, "the consumer "+d.Consumer+" of "+eventStream, func(ctx context.Context, js jetstream.JetStream) (err error) {
		consumer, err = js.Consumer(ctx, eventStream, d.Consumer)
		return err
	})
	if failure != nil {
		return failure
	}
	subject := redrivePrefix + d.Consumer
	have := consumer.CachedInfo().Config
	if !slices.ContainsFunc(append(have.FilterSubjects, have.FilterSubject), func(p string) bool { return covers(p, subject) }) {
		return notRun(newError(ErrInvalid, "the consumer %s of %s does not take %s: add that to its filter, and to the subjects of the stream", d.Consumer, eventStream, subject))
	}
	h := copyHeader(d.Header)
	h[headerSubject] = []string{d.Subject}
	h[jetstream.MsgIDHeader] = []string{"redrive-" + strconv.FormatUint(d.Sequence, 10) + "-" + strconv.FormatInt(d.Time.UnixNano(), 36)}
	return s.storeWithRetries(ctx, &exchange{subject: subject, header: h, data: d.Data}, s.eventStream(), callConfigs[kindEvent], nil)
}

// storeDeadLetter stores a dead letter. It reports false if Stop's time is up before that.
func (f *feed) storeDeadLetter(r *request, failure *Error, attempts int) bool {
	d := r.delivery
	reason := failure.Error()
	own := nats.Header{
		headerSubject:         {r.msg.Subject},
		headerID:              {d.id},
		headerTime:            {d.time.Format(time.RFC3339Nano)},
		headerConsumer:        {d.consumer},
		headerReason:          {strings.Map(printable, reason[:min(len(reason), maxReason)])},
		headerAttempts:        {strconv.Itoa(attempts)},
		jetstream.MsgIDHeader: {d.consumer + "-" + strconv.FormatUint(d.sequence, 10) + "-" + strconv.FormatInt(d.time.UnixNano(), 36)},
	}
	x := exchange{subject: f.letters(), header: copyHeader(r.in.Header), data: r.in.Data}
	maps.Copy(x.header, own)
	if messageSize(x.header, x.data)+64 > f.svc.conns[0].limit.Load() { // it is not from Publish, which leaves room
		x.header, x.data = own, nil
		own[headerReason] = []string{"(too large to be copied, see sequence " + strconv.FormatUint(d.sequence, 10) + " of " + f.stream.Name + ") " + own[headerReason][0]}
	}
	if !f.retryUntilStopped(r, "a dead letter can't be stored", func(context.Context) *Error { return f.svc.publishDeadLetter(&x, 5*time.Second) }) {
		return false
	}
	f.meter.dead.Add(1)
	f.logger(r).Error("set aside as a dead letter", "error", failure, "attempts", attempts)
	return true
}

func (f *feed) letters() string { return letterPrefix + f.kind + "." + f.lanes[0].config.Durable }

// publishDeadLetter puts x into the stream of dead letters.
func (s *Service) publishDeadLetter(x *exchange, limit time.Duration) *Error {
	_, failure := s.store(context.Background(), x.within(context.Background(), limit), s.deadStream())
	return failure
}

// copyHeader returns h without the headers that mean something to the server, and those that nats.go would not send.
func copyHeader(h nats.Header) nats.Header {
	out := make(nats.Header, len(h)+8)
	for key, values := range h {
		odd := strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r) })
		if !strings.HasPrefix(key, "Nats-") && key != "" && !odd {
			out[key] = values
		}
	}
	return out
}

func printable(r rune) rune {
	if r < ' ' {
		return ' '
	}
	return r
}
