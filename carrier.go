package aegis

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// This file has the carrier: the connection of the feeds. Their messages don't hold up calls there. Unlike the connections of the
// pool it buffers what is published while it is down, because an acknowledgement that is lost makes a message run twice.

// A carrier is the connection of the feeds, the feeds, and the latest acknowledgements.
type carrier struct {
	conn  atomic.Pointer[conn] // nil until the first feed is opened
	mu    sync.Mutex           // guards feeds; held while the connection is made or closed
	feeds []*feed

	acksMu sync.Mutex // guards the rest
	acks   []sentAck  // a ring
	next   int        // the position in acks of the next one
}

// A sentAck is the acknowledgement of a message that is finished.
type sentAck struct {
	reply, how string
	sent       time.Duration // by the clock
}

const (
	maxAcks   = 8192            // that are remembered
	ackMemory = 5 * time.Second // acknowledgements that were sent less than this before the loss was noticed may be lost
)

// addToCarrier adds f to the feeds, and makes their connection if f is the first of them. It does not wait until that is up.
func (s *Service) addToCarrier(f *feed) error {
	k := &s.carrier
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.closed.Load() {
		return s.closedError()
	}
	if k.conn.Load() == nil {
		c, err := s.connect(true)
		if err != nil {
			return err
		}
		k.conn.Store(c)
	}
	if !slices.Contains(k.feeds, f) {
		k.feeds = append(k.feeds, f)
	}
	return nil
}

// removeFromCarrier removes a feed that could not be opened.
func (s *Service) removeFromCarrier(f *feed) {
	s.carrier.mu.Lock()
	defer s.carrier.mu.Unlock()
	s.carrier.feeds = slices.DeleteFunc(s.carrier.feeds, func(other *feed) bool { return other == f })
}

// closeCarrier closes the connection of the feeds.
func (s *Service) closeCarrier() {
	k := &s.carrier
	k.mu.Lock()
	defer k.mu.Unlock()
	if c := k.conn.Load(); c != nil {
		c.disconnected()
		c.nc.Close()
	}
}

// allConns returns the connections of the pool, and that of the feeds.
func (s *Service) allConns() []*conn {
	if c := s.carrier.conn.Load(); c != nil {
		return append(slices.Clone(s.conns), c)
	}
	return s.conns
}

// pullBytes returns how many bytes a feed may ask for at once. A limit below the largest message would stall its consumer.
func (s *Service) pullBytes() int64 {
	s.carrier.mu.Lock()
	defer s.carrier.mu.Unlock()
	return max(pullBytes/int64(len(s.carrier.feeds)), 2*s.maxPayload())
}

// acknowledge reports to the server how a delivery has ended, or that it goes on. reply is the message's reply subject.
func (s *Service) acknowledge(reply, how string) {
	k, c, payload := &s.carrier, s.carrier.conn.Load(), ackPayload
	if how != ack {
		payload = []byte(how)
	}
	switch how {
	case ackInProgress:
		if !c.up.Load() { // it would be out of date when the connection is back
			return
		}
	case ack, ackTerminate:
		k.remember(sentAck{reply, how, clock()})
	}
	_ = c.nc.Publish(reply, payload) // fails if the connection is closed, or its buffer is full: then the message is redelivered
}

var ackPayload = []byte(ack)

// remember puts an acknowledgement into the ring.
func (k *carrier) remember(a sentAck) {
	k.acksMu.Lock()
	defer k.acksMu.Unlock()
	if len(k.acks) < maxAcks {
		k.acks = append(k.acks, a)
		return
	}
	k.acks[k.next] = a
	k.next = (k.next + 1) % maxAcks
}

// carrierIsBack sends the acknowledgements again that may have been lost with the connection, at the time lost by the clock. The
// server ignores those that it has. Then it makes the feeds ask again.
func (s *Service) carrierIsBack(c *conn, lost time.Duration) {
	k := &s.carrier
	k.acksMu.Lock()
	acks := slices.Clone(k.acks)
	k.acksMu.Unlock()
	for _, a := range acks {
		if a.sent > lost-ackMemory {
			_ = c.nc.Publish(a.reply, []byte(a.how)) // fails only if the connection is closed
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, f := range k.feeds {
		signal(f.renew)
	}
}
